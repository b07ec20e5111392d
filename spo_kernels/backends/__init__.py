"""Backends: matrix products, and everything that happens to a logits tile between them."""
