"""Integrated gradients of neurons (KN, Dai et al. 2022; KNE, arXiv 2412.20637).

P_j is the probability of an answer's j-th token, given the prompt and the tokens before it; a_l is the input of the
down-projection W_l at the positions whose logits predict the answer. With the M nodes of the midpoint rule,
    Attr(l, k) = sum_j a_l[j, k] / M * sum_{r < M} d(sum_i P_i)(beta_r a_l) / d a_l[j, k],   beta_r = (r + 1/2) / M

Scaling a_l and scaling the columns of W_l give the same output, and
    <W[:, k], dP/dW[:, k]> = sum_j a[j, k] (W^T g_j)_k,   g the gradient of the down-projection's output
so the gradient of a weight is never formed. The scores are linear in g: the gradients of all nodes are summed first,
and W is read once per layer (`score_neurons`).

Exact savings: positions before the first scaled one keep their keys and values; no layer below the scaled one is run
again; all edits run together, and so do several nodes while edits are few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal, NamedTuple

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


class LayerRows(NamedTuple):
    """What one layer holds at every live row, observed on the unscaled model.

    residual: (n_live, d_model), what the feed-forward block's output is added to; keys: (n_live, d_ff)
    """

    residual: Tensor
    keys: Tensor


def integrated_gradients(
    model: ModelAdapter,
    sequences: Sequence[TokenSequence],
    steps: int,
    path: Literal["layer", "joint"] = "layer",
    tokens: Literal["together", "apart"] = "together",
    everywhere: bool = False,
    progress: Callable[[float], None] | None = None,
    row_budget: int = 256,
) -> Tensor:
    """Attr of every neuron for the targets of each sequence, (n_sequences, n_layers, d_ff), on the CPU, in float32
    (float64 for float64 models). Use inside `model.packed()`.

    steps: M, nodes of the midpoint rule
    path: "layer" scales the activations of one layer at a time; "joint" scales those of all layers together, each taken
        as an input of its own. "joint" costs n_layers times less and is another definition
    tokens: "together" scales all scored positions in one pass, so that an earlier one acts on later tokens too; "apart"
        scales one position at a time
    everywhere: scale and score all positions, not the scored ones only
    progress: called with the number of layers finished since the last call
    row_budget: nodes run together while they have at most this many rows; one node always fits
    Raises ValueError for other names and for steps < 1."""
    if steps < 1 or path not in ("layer", "joint") or tokens not in ("together", "apart"):
        raise ValueError(
            "integrated_gradients: wanted steps >= 1, path 'layer' or 'joint', tokens 'together' or 'apart', got"
            f" {steps}, {path!r}, {tokens!r}"
        )

    parts = [(owner, part) for owner, s in enumerate(sequences) for part in (_apart(s) if tokens == "apart" else [s])]
    live = _ScaledRows(model, [part for _, part in parts], everywhere)
    owners = torch.tensor([owner for owner, _ in parts]).repeat_interleave(torch.tensor(live.lengths))
    together = _nodes_together(steps, live.n_rows, row_budget)
    live.repeat(together)

    dtype = torch.promote_types(model.dtype, torch.float32)
    scores = torch.zeros(len(sequences), model.n_layers, model.d_ff, dtype=dtype)
    betas = [(r + 0.5) / steps for r in range(steps)]
    layers = range(model.n_layers)
    for group in [[layer] for layer in layers] if path == "layer" else [list(layers)]:
        totals: list[Tensor] = []
        for first in range(0, steps, together):
            grads = live.gradients(group, betas[first : first + together])
            totals = [a + b for a, b in zip(totals, grads, strict=True)] if totals else grads

        for layer, grad in zip(group, totals, strict=True):
            keys = live.observed[layer].keys
            weight = model.output_weight(layer)
            row_scores = score_neurons(keys, weight, (grad / steps).to(weight.dtype))
            scores[:, layer].index_add_(0, owners, row_scores.cpu())
        if progress is not None:
            progress(len(group))
    return scores


def attribute(
    model: ModelAdapter,
    edits: Sequence[Edit],
    config: AttributionConfig,
    progress: Callable[[float], None] | None = None,
) -> Tensor:
    """Attr of every neuron for the answers that `config.answer` names, (n_edits, n_layers, d_ff), on the CPU.

    progress: called with the number of layers finished since the last call. Use inside `model.packed()`."""
    sequences = _answer_sequences(model, edits, config.answer)
    return integrated_gradients(model, sequences, config.nodes, config.path, config.tokens, config.everywhere, progress)


def _answer_sequences(
    model: ModelAdapter, edits: Sequence[Edit], answer: Literal["old", "greedy", "new"]
) -> list[TokenSequence]:
    """One sequence per edit, whose targets are the answer's tokens.

    Greedy tokens are those that the model ranks first along `target_new`."""
    old = [edit.target_true if answer == "old" else None for edit in edits]
    texts = [edit.target_new if text is None else text for edit, text in zip(edits, old, strict=True)]
    sequences = target_sequences(model.tokenizer, [edit.prompt for edit in edits], texts, [edit.join for edit in edits])
    with torch.no_grad():
        greedy = observe(model, sequences, ()).greedy.cpu()

    by_edit = torch.split(greedy, [len(s.scored) for s in sequences])
    for i, text in enumerate(old):
        if answer != "new" and text is None:
            sequences[i] = replace(sequences[i], targets=tuple(by_edit[i].tolist()))
    return sequences


def _nodes_together(steps: int, n_rows: int, row_budget: int) -> int:
    """The largest divisor of `steps` whose nodes have at most row_budget rows together, or 1."""
    return max(n for n in range(1, steps + 1) if steps % n == 0 and (n == 1 or n * n_rows <= row_budget))


class _ScaledRows:
    """The live rows: those from the first scaled position of each sequence on.

    lengths: live rows of each sequence; n_rows: their sum
    observed: layer -> rows of the unscaled model
    What lies before the live rows is constant; its keys and values are computed once.
    """

    def __init__(self, model: ModelAdapter, sequences: Sequence[TokenSequence], everywhere: bool) -> None:
        self.model = model
        self.buffer = LogitBuffer(torch.promote_types(model.dtype, torch.float32))
        self.first = [0 if everywhere else s.scored[0] for s in sequences]
        self.lengths = [s.scored[-1] + 1 - start for s, start in zip(sequences, self.first, strict=True)]

        starts = [0, *accumulate(self.lengths)]
        self.n_rows = starts.pop()
        scored = [start + p - f for start, s, f in zip(starts, sequences, self.first, strict=True) for p in s.scored]
        device = model.head.weight.device
        self._scored = torch.tensor(scored, device=device)
        self._targets = torch.tensor([token for s in sequences for token in s.targets], device=device)

        with torch.no_grad():
            self._prefix = self._prefix_states(sequences)
            self.observed = self._observe(sequences)
        self.repeat(1)

    def repeat(self, times: int) -> None:
        """Run `times` copies of the rows from now on, one after the other."""
        copies = torch.arange(times, device=self._scored.device) * self.n_rows
        self.scored = (copies[:, None] + self._scored).flatten()
        self.targets = self._targets.repeat(times)

        n_sequences = len(self.lengths)
        prefix = {
            layer: (_repeated(keys, n_sequences, times), _repeated(values, n_sequences, times))
            for layer, (keys, values) in self._prefix.items()
        }
        pairs = zip(self.first, self.lengths, strict=True)
        positions = torch.cat([torch.arange(start, start + length) for start, length in pairs]).repeat(times)
        device = self.model.device
        self.plan: AttentionPlan = plan_live(self.lengths * times, self.first * times, prefix).to(device)
        self.rotary: Rotary = self.model.rotary(positions.to(device))

    def gradients(self, layers: Sequence[int], betas: Sequence[float]) -> list[Tensor]:
        """Gradients of the targets' summed probabilities in the down-projections' outputs, (n_live, d_model) per layer,
        summed over passes whose activations are beta times the observed ones.

        layers: one layer, or all
        betas: as many as there are copies of the rows"""
        model = self.model
        outputs: list[Tensor] = []
        rows = torch.empty(0)
        with torch.enable_grad():
            for layer in range(layers[0], model.n_layers):
                if layer not in layers:
                    rows = model.run(rows, range(layer, layer + 1), self.plan, self.rotary)
                    continue

                observed = self.observed[layer]
                if layer == layers[0]:
                    residual = observed.residual.repeat(len(betas), 1)
                else:
                    residual = model.mix(layer, rows, self.plan, self.rotary).residual
                keys = torch.cat([beta * observed.keys for beta in betas])
                outputs.append(model.down(layer, keys).detach().requires_grad_())
                rows = model.join(layer, residual, outputs[-1])
            final = take(model.final_norm(rows), self.scored)

        grads = torch.autograd.grad(final, outputs, self._probability_grad(final.detach()))
        return [grad.view(len(betas), self.n_rows, -1).sum(0) for grad in grads]

    def _probability_grad(self, final: Tensor) -> Tensor:
        """Gradient of the targets' summed probabilities in `final`, the rows that the head reads; shaped as they are.

        dP_y / dz = P_y (onehot(y) - P) for the logits z."""
        head = self.model.head
        logits = self.buffer.logits(final, head)
        slope = None if head.softcap is None else 1 - (logits / head.softcap).square()

        probabilities = torch.softmax(logits, 1)
        of_target = probabilities.gather(1, self.targets[:, None])
        grad = -of_target * probabilities
        grad.scatter_add_(1, self.targets[:, None], of_target)
        if slope is not None:
            grad.mul_(slope)
        return torch.mm(grad.to(head.weight.dtype), head.weight).to(final.dtype)

    def _prefix_states(self, sequences: Sequence[TokenSequence]) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of the tokens before the live rows, by layer; empty where there are no such tokens."""
        prefixes = [s.ids[:start] for s, start in zip(sequences, self.first, strict=True)]
        with_prefix = [i for i, prefix in enumerate(prefixes) if prefix]
        if not with_prefix:
            return {}
        constant = TreePass.start(self.model, [prefixes[i] for i in with_prefix])
        return prefix_states(self.model, constant, 0, len(sequences), with_prefix)

    def _observe(self, sequences: Sequence[TokenSequence]) -> dict[int, LayerRows]:
        """The live rows of every layer on the unscaled model."""
        model = self.model
        run = TreePass.start(model, [s.ids[: s.scored[-1] + 1] for s in sequences])
        paths = zip(run.tree.paths, self.first, strict=True)
        index = torch.tensor([row for path, start in paths for row in path[start:]])

        observed: dict[int, LayerRows] = {}
        for layer in range(model.n_layers):
            mixed = model.mix(layer, run.rows, run.plan, run.rotary)
            rows, keys = model.feed_forward_with_keys(layer, mixed)
            observed[layer] = LayerRows(take(mixed.residual, index), take(keys, index))
            run = run.at(rows)
        return observed


def _repeated(states: Tensor, n_sequences: int, times: int) -> Tensor:
    """Keys or values for `times` copies of the sequences.

    states: (n_kv_heads * n_sequences, width, d_head), heads outermost"""
    return states.view(-1, n_sequences, *states.shape[1:]).repeat(1, times, 1, 1).flatten(0, 1)


def _apart(sequence: TokenSequence) -> list[TokenSequence]:
    """One sequence per target token, which ends where that token is predicted."""
    return [
        TokenSequence(sequence.ids[: position + 1], -1, (position,), (token,))
        for position, token in zip(sequence.scored, sequence.targets, strict=True)
    ]
