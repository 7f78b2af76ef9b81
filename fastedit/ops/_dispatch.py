"""Which backend runs an op: one literal table, an explicit choice, an automatic one.

A backend of an op is a module with the op's function (same arguments as the public one, checked before) and

    supports(*arguments) -> str | None    None if it can run them, or the reason why it cannot
    worth(*arguments) -> str | None       None if it is the faster choice for them, or the measured reason why not

An op may have a second function beside it (`sparse_delta_grads`); a backend of it has both.

An explicit choice (`with backend("cpp")`, or the environment variable FASTEDIT_BACKEND) is used or raises with the
reason. Only the automatic choice passes over what is unsupported or not worth it; plain torch always works.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Parameter

# op -> backend -> module, in the order in which the automatic choice tries them.
TABLE: dict[str, dict[str, str]] = {
    "capture_keys": {
        "cuda": "fastedit.ops.cuda.capture_keys",
        "triton": "fastedit.kernels.capture_keys",
        "cpp": "fastedit.ops.cpp.capture_keys",
    },
    "score_neurons": {
        "triton": "fastedit.kernels.score_neurons",
        "cpp": "fastedit.ops.cpp.score_neurons",
    },
    "select_neurons": {
        "cuda": "fastedit.ops.cuda.select_neurons",
        "triton": "fastedit.kernels.select_neurons",
        "cpp": "fastedit.ops.cpp.select_neurons",
    },
    "masked_gram": {
        "cuda": "fastedit.ops.cuda.masked_gram",
        "triton": "fastedit.kernels.masked_gram",
        "cpp": "fastedit.ops.cpp.masked_gram",
    },
    "gram_update": {
        "cuda": "fastedit.ops.cuda.gram_update",
        "triton": "fastedit.kernels.gram_update",
        "cpp": "fastedit.ops.cpp.gram_update",
    },
    "apply_delta": {
        "cuda": "fastedit.ops.cuda.apply_delta",
        "triton": "fastedit.kernels.apply_delta",
        "cpp": "fastedit.ops.cpp.apply_delta",
    },
    "sparse_delta": {
        "triton": "fastedit.kernels.sparse_delta",
        "cpp": "fastedit.ops.cpp.sparse_delta",
    },
    "sparse_adam": {
        "cuda": "fastedit.ops.cuda.sparse_adam",
        "triton": "fastedit.kernels.sparse_adam",
        "cpp": "fastedit.ops.cpp.sparse_adam",
    },
}

# The module of each kind of kernel, whose `missing()` says why none of them runs in this installation, or None.
HOMES = {"cuda": "fastedit.ops.cuda", "triton": "fastedit.kernels._launch", "cpp": "fastedit.ops.cpp"}

BACKENDS = ("cuda", "triton", "cpp", "torch")

_chosen: ContextVar[str | None] = ContextVar("fastedit_backend", default=None)


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run an op."""


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op of the block on the backend `name`, one of BACKENDS.

    Raises ValueError for another name; the ops raise BackendUnavailable where the backend cannot run them."""
    token = _chosen.set(_known(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def run(op: str, *arguments: Any, function: str | None = None) -> Any:
    """Run `op` on the chosen backend, or on the first that supports the arguments and is worth it.

    function: another function of the op's modules than the one named after it, such as its gradient"""
    name = wanted()
    if name is None:
        name = automatic(op, *arguments)
    else:
        reason = unsupported(op, name, *arguments)
        if reason is not None:
            able = [other for other in BACKENDS if unsupported(op, other, *arguments) is None]
            raise BackendUnavailable(f"{op}: backend {name!r} was asked for, but {reason}; able: {', '.join(able)}")
    function = function or op
    return getattr(module_of(op, name), function if name != "torch" else f"{function}_torch")(*arguments)


def wanted() -> str | None:
    """The backend asked for by `backend` or by FASTEDIT_BACKEND, None for the automatic choice."""
    return _chosen.get() or _known(os.environ.get("FASTEDIT_BACKEND") or None)


def automatic(op: str, *arguments: Any) -> str:
    """The first backend of the table that supports the arguments and is worth it."""
    if _not_plain(arguments):
        return "torch"
    for name in present(op):
        module = module_of(op, name)
        if module.supports(*arguments) is None and module.worth(*arguments) is None:
            return name
    return "torch"


def unsupported(op: str, name: str, *arguments: Any) -> str | None:
    """Why backend `name` cannot run `op` on these arguments; None if it can."""
    if name == "torch":
        return None
    if name not in TABLE.get(op, {}):
        return f"{op} has no {name} kernel"
    return _not_plain(arguments) or module_of(op, name).supports(*arguments)


def _not_plain(arguments: tuple[Any, ...]) -> str | None:
    """Why some tensor has no memory of its own for a kernel to work on, as torch's fake ones; None if all have."""
    for value in arguments:
        if isinstance(value, Tensor) and type(value) is not Tensor and type(value) is not Parameter:
            return f"kernels work on plain tensors, got a {type(value).__name__}"
    return None


def absent(op: str, name: str) -> str | None:
    """Why backend `name` can run `op` on no arguments at all in this installation; None if it can run some."""
    if name == "torch":
        return None
    if name not in TABLE.get(op, {}):
        return "no kernel"
    reason: str | None = importlib.import_module(HOMES[name]).missing()
    return reason


@cache
def present(op: str) -> tuple[str, ...]:
    """The backends of the op that can run it on some arguments in this installation, in the table's order."""
    return tuple(name for name in TABLE.get(op, {}) if absent(op, name) is None)


@cache
def module_of(op: str, name: str) -> ModuleType:
    """The module of a backend; an import error propagates."""
    return importlib.import_module(TABLE.get(op, {}).get(name, f"fastedit.ops.{op}"))


def _known(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name
