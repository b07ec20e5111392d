"""Whole training steps side by side: TRL, TRL patched, `FusedDPOTrainer`, `spo-train`.

    python -m benchmarks.training                               # GSM8K and generated pairs, full and LoRA
    python -m benchmarks.training --layouts padded packed shared    # with padding, without, each prompt once too
    python -m benchmarks.training --json FILE --plot FILE.png
    python -m benchmarks.training --read FILE --plot FILE.png   # the picture of an earlier run

One process per trainer; in a round each trains one step on the same batch while the others wait. The clock is torch's
own hook after an optimizer step, the same for all: between two of them lies everything of a step, data and logging too.
Marks say what it goes into. Peak memory counts from a floor that a process of its own measures: imports, parameters,
gradients, optimizer state.
"""
