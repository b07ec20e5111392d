"""Measure this library against what people would use otherwise, side by side, in one run.

    python -m benchmarks.run                  # time, memory and error of every variant
    python -m benchmarks.run --long           # peak memory against sequence length, with a plot
    python -m benchmarks.long_pair            # peak RSS of one pair of 2 x 16384 response tokens
    python -m benchmarks.encoding             # records to token ids: CPU seconds and memory
    python -m benchmarks.compare OLD NEW      # two commits of this library, in turns, and whether results are equal

The task is one pair-level call: hidden `[2B, T, H]` (chosen rows first), weight `[V, H]`, labels, reference
log-probabilities of zero, DPO with beta 0.1, forward and backward to dH and dW (frozen head: dH alone).
"""
