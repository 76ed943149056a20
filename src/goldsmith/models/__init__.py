"""Models: loading, proving, and the one forward path from a pack of examples to sums and log-probabilities."""
