"""Serving: which prompts of a batch are edited, the neuron of each, and decoding them all together.

A batch may hold prompts about different edits and about none. Rows that the gate rejects get no neuron, and their
logits are bit-identical to the base model's on the same padded batch. Gate and neuron are decided once, on the whole
prompt, and kept for the whole answer: a prompt about two edits gets one neuron, and a conversation is judged by its
full text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastedit.methods.meg.config import EncoderConfig, GeneratorConfig, MegConfig
from fastedit.methods.meg.encoder import Encoder, ModelTrunk, OtherTrunk, nearest
from fastedit.methods.meg.familiarity import Familiarity, is_familiar, make_net
from fastedit.methods.meg.fit import wrap
from fastedit.methods.meg.generator import Generator, Scale
from fastedit.methods.meg.generator import make_net as make_generator
from fastedit.methods.meg.neuron import attached
from fastedit.methods.meg.store import BadStore, Store
from fastedit.model.adapter import ModelAdapter
from fastedit.model.load import load_encoder
from fastedit.model.tokens import prompt_ids

# Depth of the encoder's last layer when none is named, as a share of the model's layers.
ENCODER_DEPTH = 0.2


def make_encoder(model: ModelAdapter, config: EncoderConfig) -> Encoder:
    """The encoder of a config, untrained."""
    if config.source == "model":
        layer = config.layer or max(1, round(ENCODER_DEPTH * model.n_layers))
        return Encoder(ModelTrunk(model, layer))
    return Encoder(OtherTrunk(*load_encoder(config.source), config.pooling))


@dataclass(frozen=True)
class Decision:
    """How n prompts are served.

    flat: (n, size) their neurons, zero for a prompt that the gate rejects
    active: (n,) bool, the gate lets the prompt in
    score: (n,) what the gate compares with its threshold, an entropy in nats or a cosine distance
    nearest: (n,) int64, the edit whose prompt is closest
    """

    flat: Tensor
    active: Tensor
    score: Tensor
    nearest: Tensor


class Server:
    """A model with a store of edits beside it; no weight is written.

    encoder: with the store's training in it; default: made from the store's config
    Raises BadStore if the store was made for other weights."""

    def __init__(self, model: ModelAdapter, store: Store, encoder: Encoder | None = None) -> None:
        if store.fingerprint != model.weights_hash(model.n_layers - 1):
            raise BadStore("the store was made for a model with other weights")

        self.adapter = model
        self.store = store
        self.config = store.config

        self.encoder = encoder or make_encoder(model, store.config.encoder)
        if store.encoder:
            self.encoder.load(store.encoder)
        self._gate = restore_gate(store.gate, store.config) if store.gate else None
        self._generator = restore_generator(store.generator, store.config.generator) if store.generator else None

    @torch.no_grad()
    def decide(self, prompts: Sequence[str]) -> Decision:
        """Gate and neuron of bare prompts, without a template."""
        store = self.store
        vectors = self.encoder(prompts)
        cosine, index = nearest(vectors, store.vectors)

        score = 1 - cosine if self._gate is None else self._gate(vectors)
        active = torch.ones(len(prompts), dtype=torch.bool)
        if self.config.gate.kind != "none":
            active = is_familiar(score, store.threshold)

        flat = torch.zeros(len(prompts), store.form.size)
        if self._generator is None:
            flat[active] = store.neurons[index[active]]
        elif bool(active.any()):
            flat[active] = self._generator(vectors[active])
        return Decision(flat, active, score, index)

    @contextlib.contextmanager
    def serving(self, decision: Decision) -> Iterator[None]:
        """Inside the block the model runs every batch of these prompts with their neurons."""
        with attached(self.adapter, self.store.layer, self.store.form, decision.flat, decision.active):
            yield

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """transformers' `generate` on the edited model, with its options; returns (n, length + new tokens) token ids.

        The gate reads the decoded prompts; the store's template around a prompt is taken off first."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [self._prompt(ids[keep.bool()]) for ids, keep in zip(input_ids, mask, strict=True)]
        with self.serving(self.decide(prompts)):
            return self.adapter.model.generate(input_ids=input_ids, attention_mask=mask, **options)

    def answer(self, prompts: Sequence[str], n_tokens: int | None = None) -> list[str]:
        """Greedy answers to bare prompts, which are put into the template; returned without the prompts."""
        texts = [wrap(self.config.fit.template, prompt) for prompt in prompts]
        return decode(self.adapter, texts, n_tokens or self.config.max_new_tokens, self.decide(prompts), self.serving)

    def _prompt(self, ids: Tensor) -> str:
        """The bare prompt behind token ids (n_tokens,)."""
        tokenizer = self.adapter.tokenizer
        before, _, after = self.config.fit.template.partition("{}")

        # A tokenizer that puts a beginning-of-text token before every text repeats the one of the template.
        before = before.removeprefix(tokenizer.bos_token or "")
        ids = ids[int((ids != tokenizer.bos_token_id).float().argmax()) :] if tokenizer.bos_token else ids

        plain, special = (tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False))
        for whole in (plain, special):
            start = whole.find(before)
            if start >= 0 and whole.endswith(after):
                return whole[start + len(before) : len(whole) - len(after)]
        return plain


def restore_gate(state: dict[str, Tensor], config: MegConfig) -> Familiarity:
    """The gate's network from its tensors."""
    net = make_net(state["out.weight"].shape[1], config.gate)
    net.load_state_dict(state)
    return Familiarity(net.eval().requires_grad_(False))


def restore_generator(state: dict[str, Tensor], config: GeneratorConfig) -> Generator:
    """The generator from its tensors."""
    scale = Scale(state["scale.mean"], state["scale.deviation"])
    net = make_generator(config, int(state["condition"]), len(scale.mean))
    net.load_state_dict({name[4:]: value for name, value in state.items() if name.startswith("net.")})
    return Generator(net.eval().requires_grad_(False), scale, state["noise"], config.sampler_steps)


@torch.no_grad()
def decode(
    model: ModelAdapter,
    texts: Sequence[str],
    n_tokens: int,
    decision: Decision | None = None,
    serving: Callable[[Decision], contextlib.AbstractContextManager[None]] | None = None,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy continuations of texts up to the end token, without the texts.

    Texts of similar length run together, padded on the left.
    decision: the neurons of the texts; serving: runs a batch with them; None = the base model
    progress: called with the number of texts that are done since the last call"""
    ids = prompt_ids(model.tokenizer, texts, model.n_embeddings)
    pad = model.tokenizer.pad_token_id if model.tokenizer.pad_token_id is not None else model.tokenizer.eos_token_id
    continuations = [""] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: (len(ids[i]), i))

    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        width = max(len(ids[i]) for i in group)
        rows = torch.tensor([[pad or 0] * (width - len(ids[i])) + ids[i] for i in group], device=model.device)
        mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in group], device=model.device)

        part = None if decision is None else chosen(decision, group)
        with contextlib.nullcontext() if part is None or serving is None else serving(part):
            made = model.model.generate(
                input_ids=rows, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False, pad_token_id=pad or 0
            )

        answers = model.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        for i, answer in zip(group, answers, strict=True):
            continuations[i] = answer
        if progress is not None:
            progress(len(group))
    return continuations


def chosen(decision: Decision, index: Sequence[int]) -> Decision:
    """The decision for the prompts at `index`."""
    rows = torch.tensor(list(index), dtype=torch.int64)
    return Decision(decision.flat[rows], decision.active[rows], decision.score[rows], decision.nearest[rows])
