"""Launchers of the CUDA kernels in csrc/, one file per op; the compiled module is `fastedit._cuda`."""
