"""The published NSE procedure, one edit at a time, as the yardstick for speed and exactness.

Neuron-level sequential editing (NSE, Jiang et al. 2025) in plain torch, with all the work of its description:
every step of a value runs seven padded sequences through the whole model and applies the vocabulary head twice,
the keys of every layer cost a pass through the whole model, and each system is solved densely in float64. It
shares no code with fastedit.

For edited layers e_1 < ... < e_m, with W (d_model, d_ff) the down-projection of layer e, C its second moment,
H the sum of k k^T over earlier edits, K (n_edits, d_ff) the keys and S the selected neurons:

    R = (z - h) / (layers left),    W[:, S] += R^T K_S (lambda C[S, S] + H[S, S] + K_S^T K_S)^-1

Two choices of the released code are not followed: S is the smallest prefix that reaches the mass, as in the
paper, and the target has its leading space everywhere.

The model is any Llama-like transformers model (`model.model.layers[i].mlp.down_proj`, `model.model.norm`,
`model.lm_head`) in evaluation mode; the tokenizer must be a fast one, because positions come from offsets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

SEQUENCES_PER_PASS = 128


@dataclass(frozen=True)
class PublishedSettings:
    """Constants of one run.

    layers: edited layers, ascending; the value is defined at the output of the last one.
    steps, lr: forwards per value (one update fewer) and Adam's learning rate.
    weight_decay, kl_factor: weights of the two penalties. clamp: radius of delta as a share of ||h0||.
    stop_loss: the loss below which a value is finished.
    covariance_weight: lambda. mass: p in (0, 1], 1 keeps every neuron.
    residual_min, residual_max: an edit is written while residual_min < ||z - h|| < residual_max.
    rounds: the largest number of writes through all the layers.
    """

    layers: tuple[int, ...]
    steps: int
    lr: float
    covariance_weight: float
    mass: float
    residual_min: float
    residual_max: float
    rounds: int
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    clamp: float = 0.75
    stop_loss: float = 0.05

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers: wanted distinct ascending indices, got {self.layers}")
        if self.steps < 1 or self.rounds < 1:
            raise ValueError(f"steps and rounds: wanted at least 1, got {self.steps} and {self.rounds}")
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass: wanted 0 < mass <= 1, got {self.mass}")


class Request(NamedTuple):
    """One edit: `target` shall follow `prompt`, in which `subject` ends before character `subject_end`."""

    prompt: str
    subject_end: int
    subject: str
    target: str


class ValueResult(NamedTuple):
    """One optimised value.

    value: z = h0 + delta, (d_model,); hidden0: h0, (d_model,)
    losses: of every forward; steps: number of forwards
    """

    value: Tensor
    hidden0: Tensor
    losses: list[float]
    steps: int


class Row(NamedTuple):
    """One tokenised sequence: the ids fed, the lookup token's position, and the scored positions and ids.

    The logits at scored[t] are those that predict targets[t].
    """

    ids: list[int]
    lookup: int
    scored: list[int]
    targets: list[int]


class Batch(NamedTuple):
    """Right-padded rows: ids and mask (n_rows, length) int64, lookup (n_rows,) int64."""

    rows: list[Row]
    ids: Tensor
    mask: Tensor
    lookup: Tensor


class Start(NamedTuple):
    """What the first forward of a value records: h0 (d_model,) and the log-probs of the KL row (vocab,)."""

    hidden0: Tensor
    kl_log_probs: Tensor


def token_at(offsets: Sequence[tuple[int, int]], char: int, text: str) -> int:
    """Index of the last token that covers character `char`, which may be several byte-level tokens."""
    covering = [i for i, (start, end) in enumerate(offsets) if start <= char < end]
    if not covering:
        raise ValueError(f"no token covers character {char} of {text!r}")
    return covering[-1]


def plain_row(tokenizer: Any, text: str, subject_end: int) -> Row:
    """Tokenise `text`, nothing scored; the lookup token covers the character before `subject_end`."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    lookup = token_at(encoded["offset_mapping"], subject_end - 1, text)
    return Row(list(encoded["input_ids"]), lookup, [], [])


def target_row(tokenizer: Any, text: str, subject_end: int, target: str) -> Row:
    """Tokenise `text + target` as one string; tokens that end after `text` are scored, the last not fed."""
    encoded = tokenizer(text + target, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]

    targets = [i for i, (_, end) in enumerate(offsets) if end > len(text)]
    if not targets or targets[0] == 0:
        raise ValueError(f"target {target!r} has no token of its own after {text!r}")

    # Cut at the last target token, not at the end: a tokenizer may close the string with a special token.
    fed = ids[: targets[-1]]
    lookup = token_at(offsets, subject_end - 1, text)
    return Row(fed, lookup, [i - 1 for i in targets], [ids[i] for i in targets])


def in_template(template: str, request: Request) -> tuple[str, int]:
    """The request's prompt inside a context template, and the character before which its subject ends there."""
    prompt, end = request.prompt, request.subject_end
    if not prompt[:end].endswith(request.subject):
        raise ValueError(f"subject {request.subject!r} does not end at character {end} of {prompt!r}")
    before, slot, after = template.partition("{}")
    if not slot:
        raise ValueError(f"template {template!r} has no {{}}")
    return before + prompt + after, len(before) + end


def value_rows(tokenizer: Any, request: Request, templates: Sequence[str]) -> list[Row]:
    """One rewriting row per template, then the KL row, whose lookup token is the subject's last token."""
    if list(templates[:1]) != ["{}"]:
        raise ValueError(f"templates: wanted '{{}}' first, got {list(templates)}")

    target = request.target if request.target.startswith(" ") else " " + request.target
    rows = [target_row(tokenizer, *in_template(template, request), target) for template in templates]
    return [*rows, plain_row(tokenizer, f"{request.subject} is a", len(request.subject))]


def pad(rows: Sequence[Row], tokenizer: Any, model: Any) -> Batch:
    """Right-pad `rows` with the end-of-text token on the model's device."""
    device = next(model.parameters()).device
    filler = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
    if filler is None:
        raise ValueError("the tokenizer has neither an end-of-text nor a padding token")

    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [filler] * (longest - len(row.ids)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows], device=device)
    return Batch(list(rows), ids, mask, torch.tensor([row.lookup for row in rows], device=device))


def hidden_of(output: Any) -> Tensor:
    """Hidden states of a decoder layer, which returns a tensor or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Switch off the gradients of all parameters inside the block; restore `requires_grad` afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def forward_with_delta(model: Any, batch: Batch, layer: int, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the whole model with `delta` (d_model,) added to the output of `layer` at every row's lookup token.

    Returns all logits (n_rows, length, vocab), the output of the last layer (n_rows, length, d_model), and
    the hidden state of row 0 at its lookup token before the addition (d_model,).
    """
    captured: dict[str, Tensor] = {}
    rows = torch.arange(len(batch.rows), device=delta.device)

    def shift(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = hidden_of(output).clone()
        captured["plain"] = hidden[0, batch.lookup[0]].detach().clone()
        hidden[rows, batch.lookup] += delta
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    def capture(module: nn.Module, inputs: Any, output: Any) -> None:
        captured["last"] = hidden_of(output)

    layers = model.model.layers
    handles = [layers[layer].register_forward_hook(shift), layers[-1].register_forward_hook(capture)]
    try:
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, captured["last"], captured["plain"]


def target_nll(log_probs: Tensor, rows: Sequence[Row]) -> Tensor:
    """Mean over rows of the row's mean -log p over its target tokens; log_probs (n_rows, length, vocab)."""
    per_row = [-log_probs[i, row.scored, row.targets].mean() for i, row in enumerate(rows)]
    return torch.stack(per_row).mean()


def value_loss(
    model: Any, batch: Batch, delta: Tensor, settings: PublishedSettings, start: Start | None
) -> tuple[Tensor, Start]:
    """One forward: NLL of the target + kl_factor * KL(now || first) + weight_decay * ||delta|| / ||h0||^2.

    `start` is None on the first forward (delta = 0), which records it.
    """
    logits, last, plain = forward_with_delta(model, batch, settings.layers[-1], delta)
    kl_now = torch.log_softmax(logits[-1, batch.lookup[-1]], dim=-1)
    if start is None:
        start = Start(plain, kl_now.detach().clone())

    # As published, the final norm and the head run again over every position of the rewriting rows: the
    # logits of the model's own forward are used for the KL row only.
    log_probs = torch.log_softmax(model.lm_head(model.model.norm(last[:-1])), dim=-1)
    divergence = (kl_now.exp() * (kl_now - start.kl_log_probs)).sum()
    decay = delta.norm() / start.hidden0.norm() ** 2
    nll = target_nll(log_probs, batch.rows[:-1])
    return nll + settings.kl_factor * divergence + settings.weight_decay * decay, start


def optimise_value(
    model: Any, tokenizer: Any, request: Request, templates: Sequence[str], settings: PublishedSettings
) -> ValueResult:
    """Optimise the value of one edit on the model's current weights, which stay as they are.

    templates: the context templates, each with one '{}', the first of them '{}'.
    Raises ValueError if the subject or the target cannot be found in the tokenised text.
    """
    batch = pad(value_rows(tokenizer, request, templates), tokenizer, model)
    like = next(model.parameters())
    delta = torch.zeros(model.config.hidden_size, dtype=like.dtype, device=like.device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.lr)

    start: Start | None = None
    losses: list[float] = []
    with frozen(model), torch.enable_grad():
        while True:
            loss, start = value_loss(model, batch, delta, settings, start)
            losses.append(loss.item())
            if losses[-1] < settings.stop_loss or len(losses) == settings.steps:
                return ValueResult(start.hidden0 + delta.detach(), start.hidden0, losses, len(losses))

            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

            radius = settings.clamp * start.hidden0.norm()
            if delta.norm() > radius:
                with torch.no_grad():
                    delta *= radius / delta.norm()


def at_lookup(
    model: Any, tokenizer: Any, rows: Sequence[Row], module: nn.Module, side: Literal["input", "output"]
) -> Tensor:
    """The input or output of `module` at each row's lookup token, (n_rows, width), by full passes."""
    captured: list[Tensor] = []

    def capture(module: nn.Module, inputs: Any, output: Any) -> None:
        captured.append(inputs[0] if side == "input" else hidden_of(output))

    handle = module.register_forward_hook(capture)
    try:
        for first in range(0, len(rows), SEQUENCES_PER_PASS):
            batch = pad(rows[first : first + SEQUENCES_PER_PASS], tokenizer, model)
            with torch.no_grad():
                model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
            index = torch.arange(len(batch.rows), device=batch.ids.device)
            captured[-1] = captured[-1][index, batch.lookup]
    finally:
        handle.remove()
    return torch.cat(captured)


def compute_keys(
    model: Any, tokenizer: Any, requests: Sequence[Request], templates: Sequence[str], layer: int
) -> Tensor:
    """Keys of `layer` with the current weights, (n_edits, d_ff), from the prompts alone.

    A key is half the activation in the plain prompt and half the mean over the other templates.
    Raises ValueError if there is no other template.
    """
    if len(templates) < 2:
        raise ValueError(f"templates: wanted '{{}}' and at least one more, got {len(templates)}")

    rows = [plain_row(tokenizer, *in_template(t, request)) for request in requests for t in templates]
    inputs = at_lookup(model, tokenizer, rows, model.model.layers[layer].mlp.down_proj, "input")
    grouped = inputs.view(len(requests), len(templates), -1)
    return (grouped[:, 0] + grouped[:, 1:].mean(dim=1)) / 2


def compute_hidden(model: Any, tokenizer: Any, requests: Sequence[Request], layer: int) -> Tensor:
    """Output of decoder layer `layer` at the lookup token of the plain prompts, (n_edits, d_model)."""
    rows = [plain_row(tokenizer, *in_template("{}", request)) for request in requests]
    return at_lookup(model, tokenizer, rows, model.model.layers[layer], "output")


def select_neurons(keys: Tensor, mass: float) -> Tensor:
    """The smallest set of neurons whose scores, sums of |key| over the edits, reach `mass` of the total.

    keys: (n_edits, d_ff). Returns (k,) int64 indices by descending score, ties by smallest index; mass = 1
    keeps every neuron.
    """
    scores, order = keys.double().abs().sum(dim=0).sort(descending=True, stable=True)
    if mass == 1:
        return order
    reached = scores.cumsum(dim=0)
    return order[: int((reached < mass * reached[-1]).sum()) + 1]


def solve_update(
    keys: Tensor, shares: Tensor, second_moment: Tensor, history: Tensor, chosen: Tensor, weight: float
) -> Tensor:
    """R^T K_S (lambda C[S, S] + H[S, S] + K_S^T K_S)^-1, (d_model, k) float64, by one dense solve.

    keys K: (n_edits, d_ff); shares R: (n_edits, d_model), the residual's share of this layer; second_moment C and
    history H: (d_ff, d_ff); chosen S: (k,) int64; weight: lambda.
    """
    selected = keys.double()[:, chosen]
    system = weight * second_moment.double()[chosen][:, chosen] + history.double()[chosen][:, chosen]
    system += selected.T @ selected
    return shares.double().T @ torch.linalg.solve(system, selected.T).T


def write_layer(weight: Tensor, total: Tensor, update: Tensor, chosen: Tensor) -> None:
    """Add `update` (d_model, k) to the chosen columns of `weight` and `total`, in the weight's dtype."""
    with torch.no_grad():
        weight[:, chosen] += update.to(weight.dtype)
        total[:, chosen] += update.to(weight.dtype)


def nse_batch(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    values: Tensor,
    templates: Sequence[str],
    second_moments: dict[int, Tensor],
    history: dict[int, Tensor],
    settings: PublishedSettings,
) -> dict[int, Tensor]:
    """Write one batch into the model, in place, and return what was added to each layer, (d_model, d_ff).

    values: z, (n_edits, d_model). second_moments and history: one (d_ff, d_ff) float32 matrix per edited layer;
    history gains K^T K of ALL requests, written or not, with keys computed after the last write.
    """
    weights = {layer: model.model.layers[layer].mlp.down_proj.weight for layer in settings.layers}
    totals = {layer: torch.zeros_like(weight, requires_grad=False) for layer, weight in weights.items()}
    last = settings.layers[-1]

    # One measurement more than writes: the description measures first and counts afterwards.
    for done in range(settings.rounds + 1):
        distance = (values - compute_hidden(model, tokenizer, requests, last)).norm(dim=1)
        inside = (distance > settings.residual_min) & (distance < settings.residual_max)
        active = inside.nonzero().flatten().tolist()
        if not active or done == settings.rounds:
            break

        some = [requests[i] for i in active]
        for place, layer in enumerate(settings.layers):
            keys = compute_keys(model, tokenizer, some, templates, layer)
            hidden = compute_hidden(model, tokenizer, some, last)
            shares = (values[active] - hidden) / (len(settings.layers) - place)
            chosen = select_neurons(keys, settings.mass)
            moment, past = second_moments[layer].to(keys.device), history[layer].to(keys.device)
            update = solve_update(keys, shares, moment, past, chosen, settings.covariance_weight)
            write_layer(weights[layer], totals[layer], update, chosen)

    for layer in settings.layers:
        keys = compute_keys(model, tokenizer, requests, templates, layer)
        history[layer] += (keys.T @ keys).to(history[layer])
    return totals
