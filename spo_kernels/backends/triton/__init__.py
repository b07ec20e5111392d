"""Triton kernels and their launchers. Importing this package's modules imports triton; nothing else here does."""
