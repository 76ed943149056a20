"""Training: steps of maximum likelihood, their records, checkpoints and the result."""
