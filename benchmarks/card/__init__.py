"""The benchmark of one GPU: correctness, ceilings, operations, training steps; `python -m benchmarks.card --help`."""
