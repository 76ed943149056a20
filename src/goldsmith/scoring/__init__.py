"""Scoring: log P(y | x) of gold under a model, written out, and two models compared on the same gold."""
