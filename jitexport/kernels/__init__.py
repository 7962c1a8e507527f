"""Computations that compilers do not do well by themselves, with kernels of our own where those are faster."""
