"""A generated task and a small model for it, which `examples/demo` and `experiments/displacement` share."""
