"""What a test split asks for: captions, options, yes or no."""
