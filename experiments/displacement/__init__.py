"""Likelihood displacement, with and without SPO: `python -m experiments.displacement`."""
