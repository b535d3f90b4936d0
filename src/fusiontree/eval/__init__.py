"""Judging a model: how well it predicts text, and how fast and how large it is."""
