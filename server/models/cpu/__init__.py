"""Faster forwards on the CPU: the C products, and whole decode steps in one call."""
