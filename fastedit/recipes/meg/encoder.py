"""From a prompt to a vector, so that wordings of one fact lie close and other facts do not.

Everything below the encoder's last layer is frozen: its output is computed once per text and kept, and the last layer
alone is trained, by in-batch InfoNCE on (paraphrase, original) pairs of facts that are not edited:
    loss_i = -log  exp(cos(p_i, q_i) / T) / sum_j exp(cos(p_i, q_j) / T)        j over originals other than q_i's text
Default encoder: the edited model itself up to a middle layer, which needs no other model. A BERT-like encoder can be
named by folder or hub id (:func:`fastedit.loading.load_encoder`).

Done otherwise than in the published code, on purpose: gradients are cleared at every step (there they pile up over the
whole run); two paraphrases of one fact are not each other's negatives; the temperature is 0.05 and not 1, at which
cosines cannot tell thousands apart; nothing is chosen by looking at the edits' own paraphrases.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastedit.adapter import ModelAdapter
from fastedit.attention import plan_live
from fastedit.edits import Edit
from fastedit.forward import TreePass
from fastedit.recipes.meg.config import EncoderConfig
from fastedit.tokens import encode


class Trunk(Protocol):
    """The frozen part of an encoder and its last layer, which learns."""

    last: nn.Module

    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """What enters the last layer, (n_tokens, width) per text, float32 on the processor."""
        ...

    def pool(self, states: Sequence[Tensor]) -> Tensor:
        """One vector per text, (n, width) float32, through the last layer; differentiable in its parameters."""
        ...


class ModelTrunk:
    """The edited model up to a layer, of which that layer is a copy that learns; a text's vector is the mean over its
    tokens, each scaled to unit root mean square."""

    def __init__(self, model: ModelAdapter, layer: int) -> None:
        if not 0 < layer < model.n_layers:
            raise ValueError(f"encoder.layer must lie in 1-{model.n_layers - 1}, got {layer}")
        self.model, self.layer = model, layer
        inside = set(model.layers[layer].modules())
        leaves = [part for part in model.model.modules() if part not in inside and not list(part.children())]
        configs = [part.config for part in model.model.modules() if hasattr(part, "config")]
        twin = copy.deepcopy(model.model, {id(part): part for part in (*leaves, *configs)})
        self.twin = ModelAdapter(twin, model.tokenizer, (model.family,))
        self.last = self.twin.layers[layer].float()

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
            self.last.requires_grad_(learns)
            plan = plan_live(lengths, [0] * len(lengths)).to(device)
            mixed = self.twin.mix(self.layer, rows, plan, self.twin.rotary(positions))
            rows = self.twin.feed_forward(self.layer, mixed)
        rows = rows * rows.square().mean(1, keepdim=True).add(1e-6).rsqrt()
        total = rows.new_zeros(len(lengths), rows.shape[1]).index_add(0, owner, rows)
        return total / torch.tensor(lengths, device=device)[:, None]


class OtherTrunk:
    """A BERT-like encoder of another make, whose last layer learns; a text's vector is that of its first token
    ("cls") or the mean over its tokens ("mean"), as the encoder was made for."""

    def __init__(self, model: Any, tokenizer: Any, pooling: str) -> None:
        self.model, self.tokenizer, self.pooling = model, tokenizer, pooling
        layers = getattr(getattr(model, "encoder", None), "layer", None)
        if not isinstance(layers, nn.ModuleList):
            raise ValueError(f"encoder: {type(model).__name__} has no encoder.layer, as BERT's relatives have")
        self.last = layers[-1].float()

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> list[Tensor]:
        """See `Trunk`."""
        batch = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        entering: list[Tensor] = []
        handle = self.last.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
        try:
            self.model(**batch.to(next(self.last.parameters()).device))
        finally:
            handle.remove()
        return [
            rows[kept.bool()].float().cpu() for rows, kept in zip(entering[0], batch["attention_mask"], strict=True)
        ]

    def pool(self, states: Sequence[Tensor]) -> Tensor:
        """See `Trunk`."""
        device = next(self.last.parameters()).device
        rows = nn.utils.rnn.pad_sequence(list(states), batch_first=True).to(device)
        lengths = torch.tensor([len(part) for part in states], device=device)
        real = torch.arange(rows.shape[1], device=device)[None] < lengths[:, None]
        bias = torch.zeros(real.shape, device=device).masked_fill(~real, torch.finfo(torch.float32).min)
        out = self.last(rows, bias[:, None, None])
        out = out[0] if isinstance(out, tuple) else out
        if self.pooling == "cls":
            return out[:, 0]
        return (out * real[..., None]).sum(1) / lengths[:, None]


class Encoder:
    """A trunk with what it was trained to.

    mean: (width,) float32, taken off every vector: what all texts have in common says nothing about any"""

    def __init__(self, trunk: Trunk, mean: Tensor | None = None) -> None:
        self.trunk, self.mean = trunk, mean

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> Tensor:
        """Unit vectors, (n, width) float32 on the processor."""
        found = []
        for start in range(0, len(texts), 64):
            group = texts[start : start + 64]
            found.append(self.trunk.pool(self.trunk.states(group)).cpu())
            if progress is not None:
                progress(len(group))
        raw = torch.cat(found)
        return F.normalize(raw if self.mean is None else raw - self.mean, dim=1)

    def state(self) -> dict[str, Tensor]:
        """What training changed, by name."""
        saved = {f"last.{name}": value.detach().cpu().clone() for name, value in self.trunk.last.state_dict().items()}
        return saved if self.mean is None else {**saved, "mean": self.mean}

    def load(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        self.trunk.last.load_state_dict({name[5:]: value for name, value in state.items() if name.startswith("last.")})
        self.mean = state.get("mean")


def training_pairs(others: Sequence[Edit], edits: Sequence[Edit]) -> list[tuple[str, str]]:
    """(paraphrase, original) of records that are not edited: no subject of `edits` occurs, and no subject twice."""
    seen = {edit.subject.casefold() for edit in edits}
    pairs: list[tuple[str, str]] = []
    for record in others:
        if record.subject.casefold() in seen:
            continue
        seen.add(record.subject.casefold())
        pairs += [(wording, record.prompt) for wording in record.rephrase_prompts[:2]]
    return pairs


def contrastive_loss(anchors: Tensor, originals: Tensor, same: Tensor, temperature: float) -> Tensor:
    """InfoNCE over a batch. anchors, originals: (n, width); same: (n, n) bool, pairs whose originals are one text, of
    which only the diagonal counts as the positive and none as a negative."""
    scores = F.normalize(anchors, dim=1) @ F.normalize(originals, dim=1).T / temperature
    others = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    return F.cross_entropy(scores.masked_fill(others, -torch.inf), torch.arange(len(same), device=same.device))


def train_encoder(
    encoder: Encoder,
    pairs: Sequence[tuple[str, str]],
    config: EncoderConfig,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Train the last layer on (paraphrase, original) pairs; returns the loss of every step.

    progress: called with the number of pairs seen since the last call"""
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    place = {text: i for i, text in enumerate(texts)}
    trunk = encoder.trunk
    states = [state for at in range(0, len(texts), 64) for state in trunk.states(texts[at : at + 64])]
    optimiser = torch.optim.AdamW(trunk.last.parameters(), lr=config.lr, weight_decay=0.01)
    steps = config.epochs * (len(pairs) // config.batch_size or 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=max(2, steps), pct_start=0.1)
    chooser = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    trunk.last.requires_grad_(True)
    for _ in range(config.epochs):
        order = torch.randperm(len(pairs), generator=chooser).tolist()
        for start in range(0, max(1, len(pairs) - config.batch_size + 1), config.batch_size):
            batch = [pairs[i] for i in order[start : start + config.batch_size]]
            with torch.enable_grad():
                vectors = trunk.pool([states[place[text]] for pair in batch for text in pair])
                if encoder.mean is not None:
                    vectors = vectors - encoder.mean.to(vectors.device)
                originals = torch.tensor([place[original] for _, original in batch], device=vectors.device)
                same = originals[:, None] == originals[None]
                loss = contrastive_loss(vectors[::2], vectors[1::2], same, config.temperature)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if progress is not None:
                progress(len(batch))
    trunk.last.requires_grad_(False)
    return losses


def centre(encoder: Encoder, texts: Sequence[str]) -> None:
    """Set the encoder's mean to that of the texts' vectors, before training."""
    with torch.no_grad():
        parts = [encoder.trunk.pool(encoder.trunk.states(texts[at : at + 64])) for at in range(0, len(texts), 64)]
    encoder.mean = torch.cat(parts).mean(0).cpu()


def nearest(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and index of the nearest key of every query, both (n,); queries (n, width), keys (m, width), unit."""
    best = (queries @ keys.T).max(1)
    return best.values, best.indices
