"""Chooses the backend that runs an op: the one requested by name, or else the first that is faster than plain torch.

A kind of backend is a package, listed in PACKAGES, with

    missing() -> str | None       the reason why none of its kernels can run in this process, or None

and with one module for each op that it implements, found by the op's name:

    supports(args) -> str | None  the reason why the backend cannot run the op on these arguments, or None
    worth(args) -> str | None     the measured reason why another backend is faster on them, or None
    <op>(args)                    the op itself

`args` is the op's argument record (`SelectNeurons` for `select_neurons`), which the public function has checked.
An op may have a second function (`sparse_delta_grads`); every backend of the op then has it too. The op's own file in
`fastedit.ops` has the form that always works: `<op>_torch(args)` in plain torch, or `<op>_parts(args)`, which runs
other ops through this dispatcher.

An explicit choice (`with backend("cpp")` or the environment variable FASTEDIT_BACKEND) runs or raises with the reason;
only the automatic choice falls back to plain torch. An op with parts passes an explicit choice on to them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from fastedit.ops._check import lazy

# Kind of backend -> its package, in the order in which the automatic choice tries them.
PACKAGES = {
    "cuda": "fastedit.ops.cuda",
    "triton": "fastedit.kernels",
    "cpp": "fastedit.ops.cpp",
}

BACKENDS = (*PACKAGES, "torch")

Args = TypeVar("Args", bound=NamedTuple)

_chosen: ContextVar[str | None] = ContextVar("fastedit_backend", default=None)


class BackendUnavailable(RuntimeError):
    """The backend that was requested by name cannot run an op."""


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op of the block on the backend `name`, one of BACKENDS.

    Raises ValueError for another name. An op in the block raises BackendUnavailable if the backend cannot run it."""
    token = _chosen.set(_known(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def wanted() -> str | None:
    """The backend requested by `backend` or by FASTEDIT_BACKEND; None for the automatic choice."""
    return _chosen.get() or _known(os.environ.get("FASTEDIT_BACKEND") or None)


def run(op: str, args: NamedTuple, function: str | None = None, *, written: tuple[Tensor | None, ...] = ()) -> Any:
    """Run `op` on the requested backend, or on the automatic choice.

    Autograd records nothing and autocast changes nothing inside, on any backend.
    args: the op's argument record, checked; function: the op's second function, None for the op itself
    written: the tensors that are changed in place; a graph that has saved one of them notices it
    Raises BackendUnavailable if the requested backend cannot run the op on these arguments.
    """
    args = _resolved(args)
    name = wanted()
    if name is None:
        name = automatic(op, args)
    elif (reason := unsupported(op, name, args)) is not None:
        if not has_parts(op):
            able = [other for other in BACKENDS if unsupported(op, other, args) is None]
            raise BackendUnavailable(f"{op}: backend {name!r} was requested, but {reason}; able: {', '.join(able)}")
        name = "torch"

    result = _undisturbed(_function(op, name, function or op), args)
    for value in written:
        if value is not None:
            torch.autograd.graph.increment_version(value)
    return result


def automatic(op: str, args: NamedTuple) -> str:
    """The first backend that supports the arguments and is faster on them; "torch" if there is none."""
    if _not_plain(args) is None:
        for name in present(op):
            module = module_of(op, name)
            if module.supports(args) is None and module.worth(args) is None:
                return name
    return "torch"


def unsupported(op: str, name: str, args: NamedTuple) -> str | None:
    """Why backend `name` cannot run `op` on these arguments; None if it can."""
    if name == "torch":
        return None
    if name not in kinds(op):
        return f"{op} has no {name} kernel"
    return _not_plain(args) or module_of(op, name).supports(args)


def absent(op: str, name: str) -> str | None:
    """Why backend `name` cannot run `op` in this process, whatever the arguments; None if it can run some."""
    if name == "torch":
        return None
    if name not in kinds(op):
        return "no kernel"
    reason: str | None = importlib.import_module(PACKAGES[name]).missing()
    return reason


@cache
def kinds(op: str) -> tuple[str, ...]:
    """The kinds of backend that implement the op, in the order of PACKAGES. Imports none of their modules."""
    return tuple(name for name, package in PACKAGES.items() if find_spec(f"{package}.{op}") is not None)


@cache
def present(op: str) -> tuple[str, ...]:
    """The kinds of backend that can run the op in this process on some arguments, in the order of PACKAGES."""
    return tuple(name for name in kinds(op) if absent(op, name) is None)


@cache
def module_of(op: str, name: str) -> ModuleType:
    """The module of an op's backend; for "torch" the op's own file. An import error propagates."""
    return importlib.import_module(f"{PACKAGES.get(name, 'fastedit.ops')}.{op}")


@cache
def has_parts(op: str) -> bool:
    """Whether the op's form that always works runs other ops through the dispatcher."""
    return hasattr(module_of(op, "torch"), f"{op}_parts")


def _function(op: str, name: str, function: str) -> Callable[[NamedTuple], Any]:
    if name == "torch":
        function += "_parts" if has_parts(op) else "_torch"
    run_it: Callable[[NamedTuple], Any] = getattr(module_of(op, name), function)
    return run_it


def _undisturbed(function: Callable[[NamedTuple], Any], args: NamedTuple) -> Any:
    """function(args) without autograd and autocast. Both are off as a rule, and a block that switches costs 2 us."""
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _undisturbed(function, args)

    kind = args[0].device.type
    if _casts(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return function(args)
    return function(args)


@cache
def _casts(kind: str) -> bool:
    """Whether there is autocast for a type of device."""
    return torch.amp.is_autocast_available(kind)


def _resolved(args: Args) -> Args:
    """The record with lazily negated and zero tensors written out: a kernel reads memory."""
    for value in args:
        if isinstance(value, Tensor) and lazy(value):
            break
    else:
        return args

    given = zip(args._fields, args, strict=True)
    return args._replace(
        **{name: value.resolve_neg().clone() for name, value in given if isinstance(value, Tensor) and lazy(value)}
    )


def _not_plain(args: NamedTuple) -> str | None:
    """Why a kernel cannot read some tensor's memory, as torch's fake tensors have none; None if it can read all."""
    for value in args:
        if isinstance(value, Tensor) and type(value) is not Tensor and type(value) is not Parameter:
            return f"kernels work on plain tensors, got a {type(value).__name__}"
    return None


def _known(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name
