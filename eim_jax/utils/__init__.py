"""Console, files and image operations: what knows nothing of models."""
