"""Weights of few bits: int8 by our kernels, and quantised checkpoints."""
