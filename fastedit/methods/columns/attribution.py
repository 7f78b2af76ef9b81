"""Integrated gradients of neurons (KN, Dai et al. 2022; KNE, arXiv 2412.20637).

With P_j the probability of an answer's j-th token, given the prompt and the tokens before it, and a_l the input of the
down-projection W_l at the positions whose logits predict the answer,
    Attr(l, k) = sum_j a_l[j, k] / M * sum_{r < M} d(sum_i P_i)(beta_r a_l) / d a_l[j, k],   beta_r = (r + 1/2) / M
Scaling a_l and scaling the columns of W_l give one output, and <W[:, k], dP/dW[:, k]> = sum_j a[j, k] (W^T g_j)_k with
g the gradient of the down-projection's output: no gradient of a weight is ever formed. As the scores are linear in g,
the nodes' gradients are summed first and W is read once per layer (`score_neurons`).

Exact savings: positions before the first that is scaled keep their keys and values; nothing below the scaled layer is
run again; all edits run together, and so do several nodes while edits are few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fastedit.methods.columns.config import AttributionConfig
from fastedit.methods.columns.contributions import observe
from fastedit.model.adapter import ModelAdapter
from fastedit.model.logits import LogitBuffer
from fastedit.model.packed_attention import AttentionPlan, Rotary, plan_live
from fastedit.model.packed_passes import TreePass, prefix_states, take
from fastedit.model.tokens import TokenSequence, target_sequences
from fastedit.ops.score_neurons import score_neurons
from fastedit.records.edit import Edit


class Scaled(NamedTuple):
    """Observed rows of one layer at every live position: what its feed-forward adds to, and its keys."""

    residual: Tensor
    keys: Tensor


def integrated_gradients(
    model: ModelAdapter,
    sequences: Sequence[TokenSequence],
    steps: int,
    path: str = "layer",
    tokens: str = "together",
    everywhere: bool = False,
    progress: Callable[[float], None] | None = None,
    row_budget: int = 256,
) -> Tensor:
    """Attr of every neuron for the targets of each sequence, (n_sequences, n_layers, d_ff), on the CPU, in float32
    (float64 for float64 models).

    steps: M, nodes of the midpoint rule
    path: "layer": one layer's activations are scaled at a time; "joint": those of all layers together, each taken as
        an input of its own, which costs n_layers times less and is another definition
    tokens: "together": all scored positions are scaled in one pass, so that an earlier one acts on later tokens too;
        "apart": one at a time
    everywhere: scale and score all positions, not the scored ones alone
    progress: called with the number of layers finished since the last call
    row_budget: nodes run together as long as they have no more rows than this; one node always does
    Use inside `model.packed()`. Raises ValueError for other names and steps < 1.
    """
    if steps < 1 or path not in ("layer", "joint") or tokens not in ("together", "apart"):
        raise ValueError(
            "integrated_gradients: wanted steps >= 1, path 'layer' or 'joint', tokens 'together' or 'apart', got"
            f" {steps}, {path!r}, {tokens!r}"
        )
    parts = [(owner, part) for owner, s in enumerate(sequences) for part in (_apart(s) if tokens == "apart" else [s])]
    live = _Live(model, [part for _, part in parts], everywhere)
    together = max(n for n in range(1, steps + 1) if steps % n == 0 and (n == 1 or n * sum(live.lengths) <= row_budget))
    live.repeat(together)
    owners = torch.tensor([owner for owner, _ in parts]).repeat_interleave(torch.tensor(live.lengths))
    found = torch.zeros(
        len(sequences), model.n_layers, model.d_ff, dtype=torch.promote_types(model.dtype, torch.float32)
    )
    betas = [(r + 0.5) / steps for r in range(steps)]
    layers = range(model.n_layers)
    for group in [[layer] for layer in layers] if path == "layer" else [list(layers)]:
        total: list[Tensor] = []
        for first in range(0, steps, together):
            grads = live.gradients(group, betas[first : first + together])
            total = [a + b for a, b in zip(total, grads, strict=True)] if total else grads
        for layer, grad in zip(group, total, strict=True):
            keys, weight = live.scaled[layer].keys, model.down_weight(layer)
            scores = score_neurons(keys, weight, (grad / steps).to(weight.dtype))
            found[:, layer].index_add_(0, owners, scores.cpu())
        if progress is not None:
            progress(len(group))
    return found


def attribute(
    model: ModelAdapter,
    edits: Sequence[Edit],
    config: AttributionConfig,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Attr of every neuron for the answer that the config names, (n_edits, n_layers, d_ff). Inside `model.packed()`."""
    answers = [e.target_new if config.answer != "old" or e.target_true is None else e.target_true for e in edits]
    sequences = target_sequences(model.tokenizer, [e.prompt for e in edits], answers)
    with torch.no_grad():
        seen = torch.split(observe(model, sequences, ()).greedy.cpu(), [len(s.scored) for s in sequences])
    for i, edit in enumerate(edits):
        if config.answer == "greedy" or (config.answer == "old" and edit.target_true is None):
            sequences[i] = replace(sequences[i], targets=tuple(seen[i].tolist()))
    return integrated_gradients(model, sequences, config.nodes, config.path, config.tokens, config.everywhere, progress)


class _Live:
    """Rows from the first scaled position of each sequence on, with the constant keys and values before them."""

    def __init__(self, model: ModelAdapter, sequences: Sequence[TokenSequence], everywhere: bool) -> None:
        self.model, self.buffer = model, LogitBuffer(torch.promote_types(model.dtype, torch.float32))
        self.first = [0 if everywhere else s.scored[0] for s in sequences]
        self.lengths = [s.scored[-1] + 1 - start for s, start in zip(sequences, self.first, strict=True)]
        starts = [0, *accumulate(self.lengths)]
        self.n_rows = starts.pop()
        scored = [start + p - f for start, s, f in zip(starts, sequences, self.first, strict=True) for p in s.scored]
        device = model.head.weight.device
        self._scored = torch.tensor(scored, device=device)
        self._targets = torch.tensor([token for s in sequences for token in s.targets], device=device)
        with torch.no_grad():
            prefixes = [s.ids[:start] for s, start in zip(sequences, self.first, strict=True)]
            holders = [i for i, prefix in enumerate(prefixes) if prefix]
            self._kept: dict[int, tuple[Tensor, Tensor]] = {}
            if holders:
                below = TreePass.start(model, [prefixes[i] for i in holders])
                self._kept = prefix_states(model, below, 0, len(sequences), holders)
            self.scaled = self._observe(sequences, self.first)
        self.repeat(1)

    def repeat(self, times: int) -> None:
        """Run so many copies of the rows from now on, one behind the other."""
        copies = torch.arange(times, device=self._scored.device) * self.n_rows
        self.read = (copies[:, None] + self._scored).flatten()
        self.targets = self._targets.repeat(times)
        pairs = zip(self.first, self.lengths, strict=True)
        positions = torch.cat([torch.arange(start, start + length) for start, length in pairs]).repeat(times)
        # (n_heads * n_sequences, width, d_head), the heads outermost.
        kept = {
            layer: (_repeated(key, len(self.lengths), times), _repeated(value, len(self.lengths), times))
            for layer, (key, value) in self._kept.items()
        }
        self.plan: AttentionPlan = plan_live(self.lengths * times, self.first * times, kept).to(self.model.device)
        self.rotary: Rotary = self.model.rotary(positions.to(self.model.device))

    def gradients(self, layers: Sequence[int], betas: Sequence[float]) -> list[Tensor]:
        """d(sum of the targets' probabilities) / d(down-projection's output) at every live row, (n_live, d_model) for
        each of `layers` (one, or all), summed over passes whose activations are beta times what was observed; as many
        betas as the rows are repeated."""
        model, outputs = self.model, []
        rows = torch.empty(0)
        with torch.enable_grad():
            for layer in range(layers[0], model.n_layers):
                observed = self.scaled[layer]
                if layer in layers:
                    mixed = model.mix(layer, rows, self.plan, self.rotary) if layer > layers[0] else None
                    residual = observed.residual.repeat(len(betas), 1) if mixed is None else mixed.residual
                    keys = torch.cat([beta * observed.keys for beta in betas])
                    outputs.append(model.down(layer, keys).detach().requires_grad_())
                    rows = model.join(layer, residual, outputs[-1])
                else:
                    rows = model.run(rows, range(layer, layer + 1), self.plan, self.rotary)
            final = take(model.final_norm(rows), self.read)
        grads = torch.autograd.grad(final, outputs, self._pull(final.detach()))
        return [grad.view(len(betas), self.n_rows, -1).sum(0) for grad in grads]

    def _pull(self, final: Tensor) -> Tensor:
        """d(sum of the targets' probabilities) / d(what the head reads), as `final`."""
        head = self.model.head
        logits = self.buffer.logits(final, head)
        slope = None if head.softcap is None else 1 - (logits / head.softcap).square()
        odds = torch.softmax(logits, 1)
        right = odds.gather(1, self.targets[:, None])
        # dP_y / dz = P_y (onehot(y) - P)
        pull = -right * odds
        pull.scatter_add_(1, self.targets[:, None], right)
        if slope is not None:
            pull.mul_(slope)
        return torch.mm(pull.to(head.weight.dtype), head.weight).to(final.dtype)

    def _observe(self, sequences: Sequence[TokenSequence], first: Sequence[int]) -> dict[int, Scaled]:
        model = self.model
        run = TreePass.start(model, [s.ids[: s.scored[-1] + 1] for s in sequences])
        paths = zip(run.tree.paths, first, strict=True)
        index = torch.tensor([row for path, start in paths for row in path[start:]])
        observed = {}
        for layer in range(model.n_layers):
            mixed = model.mix(layer, run.rows, run.plan, run.rotary)
            rows, keys = model.feed_forward_with_keys(layer, mixed)
            observed[layer] = Scaled(take(mixed.residual, index), take(keys, index))
            run = run.at(rows)
        return observed


def _repeated(states: Tensor, n_sequences: int, times: int) -> Tensor:
    return states.view(-1, n_sequences, *states.shape[1:]).repeat(1, times, 1, 1).flatten(0, 1)


def _apart(sequence: TokenSequence) -> list[TokenSequence]:
    """One sequence per target token, which ends where that token is predicted."""
    return [
        TokenSequence(sequence.ids[: position + 1], -1, (position,), (token,))
        for position, token in zip(sequence.scored, sequence.targets, strict=True)
    ]
