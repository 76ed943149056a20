"""Generation: decoding, to look at what was learnt, and its metrics against gold."""
