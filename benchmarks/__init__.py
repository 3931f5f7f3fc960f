"""``python -m benchmarks``: speed and memory of the primitives, losses and training step against plain PyTorch."""
