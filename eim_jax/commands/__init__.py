"""The modes of the command line."""
