"""The objective: weighted negative log-likelihood of gold tokens, as sums. Nothing in this room divides but `normalization`."""
