"""The training loop: batches, capture, checkpoints, early stopping, divergence, what it leaves."""
