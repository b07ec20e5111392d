"""Objectives whose formula was not read at its source: each docstring says what was known and what was inferred."""
