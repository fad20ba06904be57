"""Attention on a GPU: plans of a step, and the dispatch to the Triton kernels."""
