"""The Triton kernels. Imported only where they are dispatched to."""
