"""Tile backends: everything that happens to a logits tile between the matrix products."""
