"""The text encoder: prompts to vectors, such that wordings of one fact are close and other facts are not.

Everything below the encoder's last layer is frozen; its output is computed once per text and kept. Two parts are
trained: the last layer, and the weight of each token in the weighted mean that is a text's vector. The loss is in-batch
InfoNCE in both directions on (paraphrase, original) pairs of facts that are not edited:
    loss_i = -log  exp(cos(p_i, q_i) / T) / sum_c exp(cos(p_i, c) / T)
where c runs over q_i, the originals of other facts, and prompts that must not change. The last, mostly of the same
relation, are what the gate has to reject. The default encoder is the edited model itself up to an early layer, where a
vector still says which subject a prompt is about; it needs no second model. A BERT-like encoder can be named by folder
or hub id (:func:`fastedit.model.load.load_encoder`).

Deliberate differences from the published code: gradients are cleared at every step (there they accumulate over the
whole run); two paraphrases of one fact are not each other's negatives; unrelated prompts are negatives; tokens are
weighted; the temperature is 0.1 instead of 1, at which cosines cannot separate thousands of texts; nothing is chosen on
the edits' own paraphrases.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastedit.methods.meg.config import EncoderConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.model.packed_attention import plan_live
from fastedit.model.packed_passes import TreePass
from fastedit.model.tokens import encode
from fastedit.records.edit import Edit

# The token weights start equal, with a learning rate this many times that of the layer.
WEIGH_RATE = 10

# Smallest number of optimiser steps: few pairs get more epochs.
STEPS = 40


class Trunk(Protocol):
    """The frozen part of an encoder, and `learned`: its last layer ("last") and the token weights ("weigh")."""

    learned: nn.ModuleDict

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """Inputs of the last layer, (n_tokens, width) float32 on the CPU per text."""
        ...

    def pool(self, states: Sequence[Tensor]) -> Tensor:
        """One vector per text, (n, width) float32, through the last layer; differentiable in `learned`."""
        ...


class ModelTrunk:
    """The edited model up to `layer`, with a float32 copy of that layer to train. A text's vector is the weighted mean
    over its tokens, each scaled to unit root mean square.

    Raises ValueError unless 0 < layer < n_layers."""

    def __init__(self, model: ModelAdapter, layer: int) -> None:
        if not 0 < layer < model.n_layers:
            raise ValueError(f"encoder.layer must lie in 1-{model.n_layers - 1}, got {layer}")
        self.model = model
        self.layer = layer

        # The twin shares every module but that layer.
        inside = set(model.layers[layer].modules())
        leaves = [part for part in model.model.modules() if part not in inside and not list(part.children())]
        configs = [part.config for part in model.model.modules() if hasattr(part, "config")]
        twin = copy.deepcopy(model.model, {id(part): part for part in (*leaves, *configs)})
        self.twin = ModelAdapter(twin, model.tokenizer, (model.family,))

        last = self.twin.layers[layer].float()
        self.learned = nn.ModuleDict({"last": last, "weigh": _even(model.d_model, self.twin.layer_device(layer))})

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """See `Trunk`."""
        ids, _ = encode(self.model.tokenizer, texts)
        with self.model.packed():
            below = TreePass.start(self.model, ids).run(self.model, range(self.layer))
        return [below.rows[path].float().cpu() for path in below.tree.paths]

    def pool(self, states: Sequence[Tensor]) -> Tensor:
        """See `Trunk`."""
        lengths = [len(part) for part in states]
        device = self.twin.layer_device(self.layer)
        rows = torch.cat(list(states)).to(device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)

        learns = torch.is_grad_enabled()
        with self.twin.packed():
            self.learned.requires_grad_(learns)
            plan = plan_live(lengths, [0] * len(lengths)).to(device)
            mixed = self.twin.mix(self.layer, rows, plan, self.twin.rotary(positions))
            rows = self.twin.feed_forward(self.layer, mixed)

        rows = rows * rows.square().mean(1, keepdim=True).add(1e-6).rsqrt()
        weights = self.learned["weigh"](rows).exp()
        total = rows.new_zeros(len(lengths), rows.shape[1]).index_add(0, owner, weights * rows)
        return total / rows.new_zeros(len(lengths), 1).index_add(0, owner, weights)


def _even(width: int, device: torch.device) -> nn.Linear:
    """Logarithms of token weights as a linear function of the tokens' rows; all equal before training."""
    weigh = nn.Linear(width, 1, bias=False, device=device)
    nn.init.zeros_(weigh.weight)
    return weigh


class OtherTrunk:
    """A BERT-like encoder, whose last layer is trained.

    model, tokenizer: see :func:`fastedit.model.load.load_encoder`
    pooling: a text's vector is that of its first token ("cls") or the weighted mean over its tokens ("mean")
    Raises ValueError for a model without the layout of BERT."""

    def __init__(self, model: Any, tokenizer: Any, pooling: Literal["cls", "mean"]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling

        layers = getattr(getattr(model, "encoder", None), "layer", None)
        if not isinstance(layers, nn.ModuleList):
            raise ValueError(f"encoder: {type(model).__name__} has no encoder.layer, as BERT's relatives have")

        last = layers[-1].float()
        self.learned = nn.ModuleDict({"last": last})
        if pooling == "mean":
            self.learned["weigh"] = _even(model.config.hidden_size, next(last.parameters()).device)

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """See `Trunk`."""
        batch = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        entering: list[Tensor] = []
        handle = self.learned["last"].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
        try:
            self.model(**batch.to(next(self.learned.parameters()).device))
        finally:
            handle.remove()

        return [
            rows[kept.bool()].float().cpu() for rows, kept in zip(entering[0], batch["attention_mask"], strict=True)
        ]

    def pool(self, states: Sequence[Tensor]) -> Tensor:
        """See `Trunk`."""
        device = next(self.learned.parameters()).device
        rows = nn.utils.rnn.pad_sequence(list(states), batch_first=True).to(device)
        lengths = torch.tensor([len(part) for part in states], device=device)
        real = torch.arange(rows.shape[1], device=device)[None] < lengths[:, None]
        bias = torch.zeros(real.shape, device=device).masked_fill(~real, torch.finfo(torch.float32).min)

        out = self.learned["last"](rows, bias[:, None, None])
        out = out[0] if isinstance(out, tuple) else out
        if self.pooling == "cls":
            return out[:, 0]
        weights = self.learned["weigh"](out).exp() * real[..., None]
        return (out * weights).sum(1) / weights.sum(1)


class Encoder:
    """A trunk and the centre of its vectors.

    mean: (width,) float32, subtracted from every vector: what all texts have in common tells none apart"""

    def __init__(self, trunk: Trunk, mean: Tensor | None = None) -> None:
        self.trunk = trunk
        self.mean = mean

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> Tensor:
        """Unit vectors, (n, width) float32 on the CPU. progress: called with the number of texts read"""
        parts = []
        for start in range(0, len(texts), 64):
            group = texts[start : start + 64]
            parts.append(self.trunk.pool(self.trunk.states(group)).cpu())
            if progress is not None:
                progress(len(group))

        raw = torch.cat(parts)
        return F.normalize(raw if self.mean is None else raw - self.mean, dim=1)

    def state(self) -> dict[str, Tensor]:
        """Tensors that training changes, by name."""
        saved = {name: value.detach().cpu().clone() for name, value in self.trunk.learned.state_dict().items()}
        return saved if self.mean is None else {**saved, "mean": self.mean}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore tensors that `state` returned."""
        self.trunk.learned.load_state_dict({name: value for name, value in state.items() if name != "mean"})
        self.mean = state.get("mean")


class Wording(NamedTuple):
    """Two texts that ask the same, and a prompt that must not change, if there is one."""

    paraphrase: str
    original: str
    unrelated: str | None


def about(edit: Edit) -> str:
    """What a record is about, for telling records apart: its subject, without one its prompt."""
    return (edit.subject or edit.prompt).casefold()


def training_pairs(others: Sequence[Edit], edits: Sequence[Edit]) -> list[Wording]:
    """Pairs of records that are not edited. No subject of `edits` occurs, and no subject twice."""
    seen = {about(edit) for edit in edits}
    pairs: list[Wording] = []
    for record in others:
        if about(record) in seen:
            continue
        seen.add(about(record))

        unrelated: list[str | None] = [probe.prompt for probe in record.locality] or [None]
        for i, wording in enumerate(record.rephrase_prompts[:2]):
            pairs.append(Wording(wording, record.prompt, unrelated[i % len(unrelated)]))
    return pairs


def contrastive_loss(anchors: Tensor, candidates: Tensor, same: Tensor, temperature: float) -> Tensor:
    """InfoNCE over a batch, in nats.

    anchors: (n, width); candidates: (m, width), candidate i < n is the positive of anchor i
    same: (n, m) bool, candidates with the text of the anchor's positive, which are no negatives"""
    scores = F.normalize(anchors, dim=1) @ F.normalize(candidates, dim=1).T / temperature
    others = same.clone().fill_diagonal_(False)
    return F.cross_entropy(scores.masked_fill(others, -torch.inf), torch.arange(len(same), device=same.device))


def train_encoder(
    encoder: Encoder,
    pairs: Sequence[Wording],
    config: EncoderConfig,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Train last layer and token weights; returns the loss of every step.

    progress: called with the number of texts read, then of pairs seen, since the last call (`training_length`)"""
    texts = _texts(pairs)
    place = {text: i for i, text in enumerate(texts)}
    trunk = encoder.trunk
    states: list[Tensor] = []

    for at in range(0, len(texts), 64):
        states += trunk.states(texts[at : at + 64])
        if progress is not None:
            progress(len(texts[at : at + 64]))

    epochs = n_epochs(pairs, config)
    steps = epochs * max(1, len(pairs) // config.batch_size)
    rates = [config.lr * (WEIGH_RATE if name == "weigh" else 1) for name in trunk.learned]
    groups = [
        {"params": list(part.parameters()), "lr": lr} for part, lr in zip(trunk.learned.values(), rates, strict=True)
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=max(2, steps), pct_start=0.1)

    chooser = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    trunk.learned.requires_grad_(True)

    for _ in range(epochs):
        order = torch.randperm(len(pairs), generator=chooser).tolist()
        for start in range(0, max(1, len(pairs) - config.batch_size + 1), config.batch_size):
            batch = [pairs[i] for i in order[start : start + config.batch_size]]
            with torch.enable_grad():
                loss = _batch_loss(encoder, states, place, batch, config.temperature)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if progress is not None:
                progress(len(batch))

    trunk.learned.requires_grad_(False)
    return losses


def n_epochs(pairs: Sequence[Wording], config: EncoderConfig) -> int:
    """Epochs of the training: `config.epochs`, and more if that would be fewer than `STEPS` steps."""
    return max(config.epochs, -(-STEPS // max(1, len(pairs) // config.batch_size)))


def training_length(pairs: Sequence[Wording], config: EncoderConfig) -> int:
    """The total that `train_encoder` reports as progress."""
    batch = min(config.batch_size, len(pairs))
    return len(_texts(pairs)) + n_epochs(pairs, config) * (len(pairs) // batch) * batch


def _texts(pairs: Sequence[Wording]) -> list[str]:
    return list(dict.fromkeys(text for pair in pairs for text in pair if text is not None))


def _batch_loss(
    encoder: Encoder, states: Sequence[Tensor], place: Mapping[str, int], batch: Sequence[Wording], temperature: float
) -> Tensor:
    """Mean of the losses from paraphrases to originals and back; unrelated prompts are negatives in both."""
    originals = [place[pair.original] for pair in batch]
    unrelated = sorted({place[pair.unrelated] for pair in batch if pair.unrelated is not None})
    index = [*(place[pair.paraphrase] for pair in batch), *originals, *unrelated]
    vectors = encoder.trunk.pool([states[i] for i in index])
    if encoder.mean is not None:
        vectors = vectors - encoder.mean.to(vectors.device)

    reworded, own, away = torch.split(vectors, [len(batch), len(batch), len(unrelated)])
    asked = torch.tensor(originals, device=vectors.device)
    same = asked[:, None] == torch.tensor([*originals, *unrelated], device=vectors.device)[None]
    there = contrastive_loss(reworded, torch.cat([own, away]), same, temperature)
    return (there + contrastive_loss(own, torch.cat([reworded, away]), same, temperature)) / 2


def centre(encoder: Encoder, texts: Sequence[str]) -> None:
    """Set the encoder's mean to the mean of the texts' vectors, before training."""
    with torch.no_grad():
        parts = [encoder.trunk.pool(encoder.trunk.states(texts[at : at + 64])) for at in range(0, len(texts), 64)]
    encoder.mean = torch.cat(parts).mean(0).cpu()


def nearest(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """(cosine, index) of the nearest key of every query, both (n,).

    queries: (n, width) and keys: (m, width), unit vectors"""
    best = (queries @ keys.T).max(1)
    return best.values, best.indices
