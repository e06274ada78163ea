"""Parameters added to frozen towers."""
