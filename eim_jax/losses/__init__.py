"""The contrastive losses against queues, loss_base, and a stage's objective."""
