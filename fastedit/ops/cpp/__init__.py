"""Launchers of the C++ kernels in csrc/, one file per op; the compiled module is `fastedit._cpu`."""
