"""One neuron per row of a batch, as a branch beside the feed-forward of one layer.

    FFN'(z) = FFN(z) + g(a . z + b) o          at every token; z: the input of the feed-forward, after its norm
(a, b, o) is kept flat as w = [a | b | o]. In a model whose feed-forward has no gate, g is the model's activation; in a
gated model g is the identity and there is no b, so that the neuron is a rank-one linear bypass of the whole
feed-forward. w = 0 changes nothing, exactly, in both.

The published code enlarges the weight matrices by one column instead. Odd widths slow every request down and round
differently even at w = 0. The branch leaves the other rows of a batch bit-identical to the base model and copies no
weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import find
from fastedit.ops.capture_keys import ACTIVATIONS, activate
from fastedit.ops.sparse_delta import sparse_delta, sparse_delta_grads

IDENTITY = "identity"


class Parts(NamedTuple):
    """The parts of n neurons: read a (n, d_model), bias b (n,) or None, write o (n, d_model)."""

    read: Tensor
    bias: Tensor | None
    write: Tensor


@dataclass(frozen=True)
class NeuronForm:
    """What a flat neuron holds.

    activation: "identity", or an activation of `ops.capture_keys.ACTIVATIONS`; bias: whether there is b
    Raises ValueError for another activation."""

    d_model: int
    activation: str = IDENTITY
    bias: bool = False

    def __post_init__(self) -> None:
        if self.activation not in (IDENTITY, *ACTIVATIONS):
            known = ", ".join((IDENTITY, *ACTIVATIONS))
            raise ValueError(f"neuron: activation must be one of {known}, got {self.activation!r}")

    @classmethod
    def of(cls, model: ModelAdapter, activation: str = "auto") -> NeuronForm:
        """The form for a model.

        activation: "auto", as published: the model's activation and a bias without a gate, the identity without a bias
            with one; "identity"; or "model": the model's activation and a bias in either case
        Raises ValueError for another activation."""
        if activation not in ("auto", "model", IDENTITY):
            raise ValueError(f"neuron: activation must be 'auto', 'model' or 'identity', got {activation!r}")
        own = activation == "model" or (activation == "auto" and model.family.up is None)
        return cls(model.d_model, model.activation_name if own else IDENTITY, own)

    @property
    def size(self) -> int:
        """Length of w."""
        return 2 * self.d_model + self.bias

    def split(self, flat: Tensor) -> Parts:
        """Views into flat neurons (n, size). Raises ValueError for another shape."""
        if flat.ndim != 2 or flat.shape[1] != self.size:
            raise ValueError(f"neurons: wanted shape (n, {self.size}), got {tuple(flat.shape)}")
        d = self.d_model
        return Parts(flat[:, :d], flat[:, d] if self.bias else None, flat[:, -d:])

    def draw(self, d_ff: int, seed: int) -> Tensor:
        """A random start that all neurons share, (size,) float32.

        Uniform as torch initialises linear layers, and so as published: a and b within 1 / sqrt(d_model), o within
        1 / sqrt(d_ff + 1)"""
        drawn = torch.rand(self.size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        drawn[: -self.d_model] /= self.d_model**0.5
        drawn[-self.d_model :] /= (d_ff + 1) ** 0.5
        return drawn

    def activate(self, sums: Tensor) -> Tensor:
        """g of a . z + b, any shape."""
        return sums if self.activation == IDENTITY else activate(sums, self.activation)

    def slope(self, sums: Tensor) -> Tensor:
        """g' at (n,) sums."""
        if self.activation == IDENTITY:
            return torch.ones_like(sums)
        with torch.enable_grad():
            leaf = sums.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.activate(leaf).sum(), leaf)
        return slope


class Response(NamedTuple):
    """sums: (n_rows,) a . z + b; output: (n_rows, d_model) what the neuron adds, both in the dtype of the neurons."""

    sums: Tensor
    output: Tensor


def respond(form: NeuronForm, flat: Tensor, inputs: Tensor, owner: Tensor) -> Response:
    """What neurons (n, size) add to rows (n_rows, d_model). owner: (n_rows,) int64 ascending, the neuron of each row"""
    read, bias, write = form.split(flat)
    sums = (inputs.to(flat.dtype) * read[owner]).sum(1)
    if bias is not None:
        sums = sums + bias[owner]
    return Response(sums, sparse_delta(form.activate(sums)[:, None], *_columns(len(flat), owner), write.contiguous()))


def pull_back(form: NeuronForm, flat: Tensor, inputs: Tensor, owner: Tensor, sums: Tensor, grad: Tensor) -> Tensor:
    """Gradient of a loss in the neurons, (n, size), from its gradient in their output, (n_rows, d_model).

    do = sum_t g(s_t) G_t;  ds_t = g'(s_t) (o . G_t);  da = sum_t ds_t z_t;  db = sum_t ds_t
    Nothing larger than the rows is formed."""
    _, _, write = form.split(flat)
    pulled = torch.zeros_like(flat)
    to_read, to_bias, to_write = form.split(pulled)

    columns = _columns(len(flat), owner)
    back = sparse_delta_grads(
        form.activate(sums)[:, None], *columns, write.contiguous(), 1.0, grad.to(flat.dtype).contiguous()
    )
    slopes = form.slope(sums) * back.activations[:, 0]

    to_write.copy_(back.delta)
    to_read.index_add_(0, owner, slopes[:, None] * inputs.to(flat.dtype))
    if to_bias is not None:
        to_bias.index_add_(0, owner, slopes)
    return pulled


def _columns(n: int, owner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`sparse_delta`'s row_starts, index and slot_starts: every neuron is a sample with the one column there is."""
    slots = torch.arange(n + 1, device=owner.device)
    return torch.searchsorted(owner, slots), torch.zeros_like(slots[1:]), slots


@contextlib.contextmanager
def attached(model: ModelAdapter, layer: int, form: NeuronForm, flat: Tensor, active: Tensor) -> Iterator[None]:
    """Inside the block row i of every batch that the model runs has neuron flat[i].

    flat: (n, size); active: (n,) bool, the rows that have a neuron; the others keep every bit
    A batch of r * n rows, as beam search makes them, has r adjacent rows per neuron. Raises ValueError for another
    batch size, and for another shape or dtype of active."""
    if active.dtype != torch.bool or active.shape != flat.shape[:1]:
        raise ValueError(
            f"attached: active must be bool of shape {tuple(flat.shape[:1])}, got {active.dtype} {tuple(active.shape)}"
        )
    branch = _Branch(form, flat.detach(), active)
    decoder = model.layers[layer]
    gate = find(decoder, model.family.gate)
    down = find(decoder, model.family.down)

    handles = [
        decoder.register_forward_pre_hook(branch.enter, with_kwargs=True),
        gate.register_forward_pre_hook(branch.read),
        down.register_forward_hook(branch.add),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Branch:
    """The three hooks of a layer: they count its rows, keep the input of the feed-forward, and add the neurons."""

    def __init__(self, form: NeuronForm, flat: Tensor, active: Tensor) -> None:
        self.form, self.n, self.active = form, len(flat), active
        self.flat = flat[active]
        self.n_rows = 0
        self.inputs = torch.empty(0)
        self.placed: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def enter(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        """Before the decoder layer: count the rows of the batch."""
        rows = args[0] if args else kwargs["hidden_states"]
        self.n_rows = rows.shape[0]
        if self.n_rows % self.n:
            raise ValueError(f"neurons for {self.n} rows cannot serve a batch of {self.n_rows}")

    def read(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Before the gate, or the up-projection of a model without one: keep the input."""
        self.inputs = args[0]

    def place(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(indices of the batch's rows that have a neuron, their neurons), made once for a whole answer."""
        key = (self.n_rows, device)
        if key not in self.placed:
            share = self.n_rows // self.n
            rows = self.active.repeat_interleave(share).nonzero().flatten()
            self.placed[key] = (rows.to(device), self.flat.repeat_interleave(share, 0).to(device))
        return self.placed[key]

    def add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """After the down-projection: add what the neurons answer."""
        if len(self.flat) == 0:
            return output

        rows, flat = self.place(output.device)
        # OPT's feed-forward gets its rows without the batch dimension.
        inputs = self.inputs.reshape(self.n_rows, -1, self.form.d_model)[rows]
        owner = torch.arange(len(rows), device=output.device).repeat_interleave(inputs.shape[1])
        added = respond(self.form, flat, inputs.flatten(0, 1), owner).output.view(inputs.shape)

        changed = output.clone()
        grid = changed.view(self.n_rows, -1, self.form.d_model)
        # Added in float32 and rounded once.
        grid[rows] = (grid[rows].to(added.dtype) + added).to(grid.dtype)
        return changed
