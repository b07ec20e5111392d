"""A batch of preference pairs, and the ways to compute its loss and gradients."""
