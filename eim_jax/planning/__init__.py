"""What a run would cost on hardware that need not be here."""
