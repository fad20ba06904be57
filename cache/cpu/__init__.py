"""Attention on the CPU: single rows and chunks through C kernels, torch where there are none."""
