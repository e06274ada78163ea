"""Text from a trained model: decoding, and likelihoods of given texts."""
