"""Kernels: C for the CPU's decode step. Each is tested against `cache.reference`."""
