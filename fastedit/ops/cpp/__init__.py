"""Launchers of the C++ kernels in csrc/, one file per op; the compiled module is `fastedit._cpu`.

They run on CPU tensors with torch's number of threads. The instruction set is the widest that the processor has, or the
one that FASTEDIT_ISA names (baseline, avx2, avx512) for comparing them.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@cache
def missing() -> str | None:
    """Why there are no C++ kernels in this installation; None if there are."""
    return None if find_spec("fastedit._cpu") else "fastedit._cpu was not compiled (fastedit doctor says why)"


@cache
def compiled() -> ModuleType:
    """The module `fastedit._cpu`; an import error propagates."""
    return importlib.import_module("fastedit._cpu")


def cannot(*values: Tensor | None, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> str | None:
    """Why the kernels cannot take these floating-point tensors; None if they can."""
    if missing() is not None:
        return missing()

    for value in values:
        if value is not None and value.device.type != "cpu":
            return f"the C++ kernels run on the CPU, got a tensor on {value.device}"
        if value is not None and value.dtype not in dtypes:
            return f"the C++ kernel takes {' or '.join(map(str, dtypes))}, got {value.dtype}"
    return None


def setting() -> tuple[int, int]:
    """The first two arguments of every kernel: number of the instruction set, number of threads.

    Raises ValueError for an instruction set that is unknown or that the processor lacks."""
    module = compiled()
    best: int = module.best_isa()
    name = os.environ.get("FASTEDIT_ISA") or module.ISAS[best]
    if name not in module.ISAS[: best + 1]:
        raise ValueError(f"FASTEDIT_ISA must be one of {', '.join(module.ISAS[: best + 1])} here, got {name!r}")
    return module.ISAS.index(name), torch.get_num_threads()


def address(value: Tensor | None) -> int:
    """The address of the tensor's first element; 0 for None."""
    return 0 if value is None else value.data_ptr()


def rows(value: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, else a contiguous copy."""
    return value if value.stride(-1) == 1 or value.shape[-1] <= 1 else value.contiguous()
