"""CUDA graphs of decode steps: how they are found, and how a step is captured into one."""
