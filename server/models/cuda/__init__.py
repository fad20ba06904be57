"""Faster forwards on CUDA: merged products, Triton norms and gate, and the forward of a whole model."""
