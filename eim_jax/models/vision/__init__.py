"""Vision towers, and the text towers that share their joint space."""
