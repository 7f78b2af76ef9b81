"""Fitting one neuron per edit, all edits at once.

Every edit has its own (a, b, o), from one shared start. Gradient descent lowers the mean cross-entropy of its answer,
full stop and end token after the prompt, in nats. Losses are summed over edits, so each edit's gradient is what it
would be alone. The published code fits one edit after another at batch one and runs the whole model every time. The
savings here are exact: layers below the neuron run once (:mod:`.passes`); nothing but (a, b, o) gets a gradient
(:func:`.neuron.pull_back`); logits are computed at the answer's positions only, and success is read from them, since
greedy decoding gives the target if every arg-max under teacher forcing is right. Each edit stops when it is fitted.

Deliberate differences from the published code: the model is in evaluation mode (phi-2 was fitted with its dropout on);
w is float32 whatever the model's dtype, since descent in half precision loses updates below half a unit in the last
place; the start is copied for every edit and stored with the neurons (there, an assignment by reference let the start
drift from edit to edit).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastedit.methods.meg.config import FitConfig
from fastedit.methods.meg.neuron import NeuronForm, pull_back, respond
from fastedit.methods.meg.passes import UpperRows, best_tokens, group_by_rows
from fastedit.model.adapter import ModelAdapter
from fastedit.model.logits import LogitBuffer, loss_rows
from fastedit.model.tokens import TokenSequence, target_sequences
from fastedit.records.join import opening

# Depth of the neuron's layer when none is named, as a share of the model's layers.
DEPTH = 0.75


@dataclass(frozen=True)
class Fitted:
    """Neurons of n edits.

    flat: (n, size) float32; initial: (size,) float32, their shared start
    solved: (n,) bool, every target token is the arg-max
    losses: (n,) float32 of the last forward pass, in nats; steps: (n,) int64 taken
    """

    flat: Tensor
    initial: Tensor
    solved: Tensor
    losses: Tensor
    steps: Tensor


def fit_layer(config: FitConfig, n_layers: int) -> int:
    """The layer of the neuron: config.layer, else at DEPTH. Raises ValueError for a layer that the model lacks."""
    layer = round(DEPTH * n_layers) if config.layer is None else config.layer
    if layer >= n_layers:
        raise ValueError(f"fit.layer must lie in 0-{n_layers - 1}, got {layer}")
    return layer


def wrap(template: str, prompt: str) -> str:
    """The prompt inside a template, without spaces at the end of either: the space before an answer is the answer's."""
    return opening(template.replace("{}", opening(prompt), 1))


def fit_sequences(
    model: ModelAdapter, prompts: Sequence[str], answers: Sequence[str], config: FitConfig
) -> list[TokenSequence]:
    """One sequence per edit: prompt in its template, answer, ending and end token, the last three scored."""
    texts = [answer if answer.endswith(config.ending) else answer.rstrip() + config.ending for answer in answers]
    sequences = target_sequences(model.tokenizer, [wrap(config.template, prompt) for prompt in prompts], texts)

    end = model.tokenizer.eos_token_id
    if not config.stop_token or end is None:
        return sequences
    return [TokenSequence((*s.ids, s.targets[-1]), -1, (*s.scored, len(s.ids)), (*s.targets, end)) for s in sequences]


def shared_start(
    model: ModelAdapter, form: NeuronForm, sequences: Sequence[TokenSequence], layer: int, config: FitConfig, seed: int
) -> Tensor:
    """The shared start of all neurons, (size,) float32; see `FitConfig.start`."""
    drawn = form.draw(model.d_ff, seed)
    if config.start == "drawn":
        return drawn

    # The mean input z of the feed-forward over all positions where a scored token is predicted.
    total, count = torch.zeros(model.d_model), 0
    with model.packed():
        for group in group_by_rows(sequences, config.token_budget):
            rows = UpperRows.start(model, [sequences[i] for i in group], layer)
            at_answer = rows.inputs[rows.scored].float()
            total += at_answer.sum(0).cpu()
            count += len(at_answer)
    mean = total / count

    # a . z is then about one wherever an answer begins, whatever the prompt.
    read, _, _ = form.split(drawn[None])
    read[0] = mean / mean.square().sum()
    return drawn


def fit_neurons(
    model: ModelAdapter,
    sequences: Sequence[TokenSequence],
    form: NeuronForm,
    initial: Tensor,
    layer: int,
    config: FitConfig,
    progress: Callable[[int], None] | None = None,
) -> Fitted:
    """Fit a neuron to each of n sequences (see `fit_sequences`), all from `initial` (size,).

    progress: called with the number of edits finished since the last call
    A neuron whose loss is not finite is returned as the start, unsolved. Sequences run in groups of similar length;
    which ones share a group changes only the rounding."""
    n = len(sequences)
    fitted = Fitted(
        initial.float().repeat(n, 1),
        initial.float().clone(),
        torch.zeros(n, dtype=torch.bool),
        torch.full((n,), float("nan")),
        torch.zeros(n, dtype=torch.int64),
    )
    with model.packed():
        for group in group_by_rows(sequences, config.token_budget):
            part = _fit_group(model, [sequences[i] for i in group], form, initial, layer, config, progress)
            index = torch.tensor(group)
            for name in ("flat", "solved", "losses", "steps"):
                getattr(fitted, name)[index] = getattr(part, name).cpu()

    lost = ~fitted.losses.isfinite()
    fitted.flat[lost] = fitted.initial
    fitted.solved[lost] = False
    return fitted


@dataclass(frozen=True)
class Judged:
    """Result of a forward and a backward pass.

    losses: (n,) in nats; grad: (n, size); top1: (n,) bool, every target token is the arg-max
    """

    losses: Tensor
    grad: Tensor
    top1: Tensor


class AnswerLoss:
    """The loss of each sequence's answer under a neuron of its own, and its gradient with respect to that neuron."""

    def __init__(self, model: ModelAdapter, form: NeuronForm, rows: UpperRows) -> None:
        self.model = model
        self.form = form
        self.rows = rows
        self.buffer = LogitBuffer()

        device = model.head.weight.device
        counts = torch.tensor([len(s.targets) for s in rows.sequences])
        self.counts = counts.to(device)
        self.owner = torch.arange(len(counts)).repeat_interleave(counts).to(device)
        self.targets = torch.tensor([token for s in rows.sequences for token in s.targets], device=device)
        self.weights = (1 / counts).repeat_interleave(counts).to(device)

    def __call__(self, flat: Tensor) -> Judged:
        """flat: (n, size) float32."""
        rows, head = self.rows, self.model.head
        with torch.no_grad():
            response = respond(self.form, flat, rows.inputs, rows.owner)
        added = response.output.requires_grad_()
        with torch.enable_grad():
            read = rows.run(self.model, added)

        nothing = read.new_empty(0, head.weight.shape[0], dtype=torch.float32)
        scored = loss_rows(read.detach(), head, self.targets, self.weights, 0.0, nothing, self.buffer)
        (grad,) = torch.autograd.grad(read, added, scored.grad.to(read.dtype))
        # Zero times infinity is NaN: a neuron that diverges must not spoil the others.
        grad = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)

        losses = torch.zeros(len(flat), device=flat.device)
        losses.index_add_(0, self.owner.to(flat.device), scored.losses.to(flat.device))
        hits = torch.zeros(len(flat), device=flat.device)
        hits.index_add_(0, self.owner.to(flat.device), scored.top1.to(flat.device, hits.dtype))

        pulled = pull_back(self.form, flat, rows.inputs, rows.owner, response.sums, grad)
        return Judged(losses, pulled, hits == self.counts.to(flat.device))


class Solves:
    """Whether neurons make every scored token of their sequences the arg-max; greedy decoding then gives the answer.

    The constructor runs the layers below the neuron, once for all neurons that are tried."""

    def __init__(
        self, model: ModelAdapter, form: NeuronForm, sequences: Sequence[TokenSequence], layer: int, budget: int = 2048
    ) -> None:
        self.model = model
        self.form = form
        self.sequences = list(sequences)
        self.groups = group_by_rows(sequences, budget)
        self.buffer = LogitBuffer()
        with model.packed():
            self.rows = [UpperRows.start(model, [sequences[i] for i in group], layer) for group in self.groups]

    def __call__(self, flat: Tensor) -> list[bool]:
        """flat: (n, size), neuron i for sequence i."""
        solved = [False] * len(self.sequences)
        with self.model.packed():
            for group, rows in zip(self.groups, self.rows, strict=True):
                own = flat[torch.tensor(group)].to(rows.inputs.device)
                added = respond(self.form, own, rows.inputs, rows.owner).output
                for i, best in zip(group, best_tokens(self.model, rows, added, self.buffer), strict=True):
                    solved[i] = best == self.sequences[i].targets
        return solved


def _fit_group(
    model: ModelAdapter,
    sequences: Sequence[TokenSequence],
    form: NeuronForm,
    initial: Tensor,
    layer: int,
    config: FitConfig,
    progress: Callable[[int], None] | None,
) -> Fitted:
    """`fit_neurons` for sequences that run together. Those that have stopped are dropped when they are half of all."""
    rows = UpperRows.start(model, sequences, layer)
    device = rows.inputs.device
    n = len(sequences)

    flat = initial.to(device, torch.float32).repeat(n, 1)
    fitted = Fitted(
        flat.clone(),
        initial,
        torch.zeros(n, dtype=torch.bool, device=device),
        torch.zeros(n, device=device),
        torch.zeros(n, dtype=torch.int64, device=device),
    )
    loss = AnswerLoss(model, form, rows)
    index = torch.arange(n, device=device)
    running = torch.ones(n, dtype=torch.bool, device=device)

    for step in range(config.steps + 1):
        judged = loss(flat)
        # A row that has stopped stays in the pass until it is dropped; what it becomes there is not kept.
        fresh = index[running]
        fitted.losses[fresh] = judged.losses[running]
        fitted.solved[fresh] = judged.top1[running]
        fitted.flat[fresh] = flat[running]
        fitted.steps[fresh] = step

        stop = running & judged.top1 & (judged.losses < config.stop_loss)
        if progress is not None and bool(stop.any()):
            progress(int(stop.sum()))
        running = running & ~stop
        left = int(running.sum())
        if left == 0 or step == config.steps:
            break

        if 2 * left <= len(index):
            keep = running.nonzero().flatten()
            loss = AnswerLoss(model, form, loss.rows.select(keep.tolist()))
            flat, index, running = flat[keep], index[keep], running[keep]
            judged = Judged(judged.losses[keep], judged.grad[keep], judged.top1[keep])
        flat = _moved(config, flat, judged)

    if progress is not None and left:
        progress(left)
    return fitted


def _moved(config: FitConfig, flat: Tensor, judged: Judged) -> Tensor:
    """The neurons after one step, (n, size); one that would become infinite or NaN stays as it is."""
    if config.optimiser == "descent":
        moved = flat - config.lr * judged.grad
    else:
        # Polyak's step towards a loss of zero: its length fits any start.
        rate = config.lr * judged.losses / judged.grad.square().sum(1).clamp_min(1e-12)
        moved = flat - rate[:, None] * judged.grad
    return torch.where(moved.isfinite().all(1, keepdim=True), moved, flat)
