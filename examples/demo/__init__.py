"""A small preference-training job from data to plots: ``python -m examples.demo``."""
