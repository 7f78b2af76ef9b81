"""Triton kernels, one file per op, installed as `fastedit.kernels`."""

import importlib
import os
from functools import cache
from importlib.util import find_spec


def interpreted() -> bool:
    """Whether Triton's interpreter is requested; what counts is the answer when a kernel's module is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@cache
def missing() -> str | None:
    """Why no Triton kernel can run in this process; None if some can. Imports Triton only where it may run."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted():
        return None

    # Not above: importing this package alone must stay light.
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA device"
    reason: str | None = importlib.import_module("fastedit.kernels._launch").driver_problem()
    return reason
