"""How fast are the GPU kernels, beside the card and other kernels?"""
