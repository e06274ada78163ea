"""EIM in JAX: contrastive losses against whole-data-set queues, trained in segmented stages."""

__version__ = "0.1.0"
