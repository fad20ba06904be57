"""Kernels: `c/` for the CPU, built by `build`; `triton/` for the GPU. Each is tested against the fp32 reference."""
