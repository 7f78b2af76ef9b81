"""Triton kernels, one file per op, installed as `fastedit.kernels`."""
