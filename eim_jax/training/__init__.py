"""Training in segmented stages: set-up, partition, step, stages, checkpoints, log."""
