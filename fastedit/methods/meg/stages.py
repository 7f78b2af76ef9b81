"""The stages from edits to a store, each kept in a folder, so that a run goes on where it stopped.

    encoder     learn from pairs of facts that are not edited
    neurons     fit one neuron per edit
    gate        learn the edits' prompts by heart; choose the threshold on the development slice
    generator   learn prompt vector -> neuron
Records that are not edited (`others`) are cut in two by subject: a development slice, on which alone the threshold is
chosen, and the rest, from which the encoder learns and which the gate is told not to know. Neither shares a subject
with the edits: the published thresholds and checkpoints were looked up on the reported edits.

A stage's file is used again if it was made from the same things; neurons one by one, so that a run with more edits
fits the new ones alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastedit.methods.meg.config import MegConfig
from fastedit.methods.meg.encoder import centre, nearest, train_encoder, training_length, training_pairs
from fastedit.methods.meg.familiarity import Familiarity, choose_threshold, train_familiarity
from fastedit.methods.meg.fit import Solves, fit_layer, fit_neurons, fit_sequences, shared_start
from fastedit.methods.meg.generator import (
    Generator,
    Scale,
    Training,
    judge_every,
    make_net,
    start_noise,
    train_epoch,
    with_zeros,
)
from fastedit.methods.meg.neuron import NeuronForm
from fastedit.methods.meg.serve import make_encoder
from fastedit.methods.meg.store import STAGE, KnownNeurons, Store, read_tensors, write_tensors
from fastedit.model.adapter import ModelAdapter
from fastedit.model.tokens import TokenSequence
from fastedit.records.edit import Edit
from fastedit.runtime.progress import track

# Thresholds where there is no development slice to choose them on: nats, and cosine distance.
BLIND = {"familiarity": 0.3, "cosine": 0.3, "none": float("inf")}
# Edits fitted between two saves; edits that a generator is judged on; development records at least, if there are.
CHUNK = 128
JUDGED = 128
SMALLEST_SLICE = 64


class Stages:
    """One run: what goes in, and `store`, which does what is not yet done.

    others, development: records that are not edited, see `split_others`; folder: where stages are kept, None = nowhere;
    show: progress bars; base: a store whose neurons are taken over where they were fitted in the same way"""

    def __init__(
        self,
        model: ModelAdapter,
        edits: Sequence[Edit],
        others: Sequence[Edit] = (),
        development: Sequence[Edit] | None = None,
        config: MegConfig | None = None,
        seed: int = 0,
        folder: str | Path | None = None,
        show: bool | None = None,
        base: Store | None = None,
    ) -> None:
        self.model, self.edits, self.config = model, list(edits), config or MegConfig()
        self.seed, self.show, self.base = seed, show, base
        self.folder = None if folder is None else Path(folder)
        rest, self.development = split_others(others, edits, development)
        self.rest = rest[: self.config.max_others]
        self.fingerprint = model.weights_hash(model.n_layers - 1)
        self.layer = fit_layer(self.config.fit, model.n_layers)
        self.form = NeuronForm.of(model, self.config.fit.activation)
        self.encoder = make_encoder(model, self.config.encoder)
        self.seconds: dict[str, float] = {}
        self._read: list[Tensor] | None = None

    def store(self) -> Store:
        """Run what is missing, and put everything together."""
        trained = self._timed("encoder", self._learn_encoder)
        vectors = self._timed("vectors", lambda: self._vectors([e.prompt for e in self.edits], "reading the prompts"))
        initial, flat, solved = self._timed("neurons", self._fit)
        threshold, gate = self._timed("gate", lambda: self._learn_gate(vectors, solved))
        generator = self._timed("generator", lambda: self._learn_generator(vectors, initial, flat, solved))
        facts = [(edit.case_id, edit.prompt, edit.target_new) for edit in self.edits]
        store = Store(
            self.config, self.layer, self.form, initial, facts, flat, solved, vectors, threshold, self.fingerprint,
            self.seed, trained, gate, generator, self.seconds,
        )  # fmt: skip
        if self.folder is not None:
            store.save(self.folder / "meg.safetensors")
        return store

    def _timed(self, name: str, stage: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = stage()
        # A stage that was read knows what it took when it was made.
        self.seconds.setdefault(name, time.perf_counter() - started)
        return found

    def _kept(
        self, name: str, inputs: Any, make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]], kind: str = ""
    ) -> Any:
        """A stage's tensors and plain results: read if they were made from the same inputs, else made and written.

        kind: of a stage that comes in several, each of which has a file, so that controls do not undo each other"""
        key = _digest([self.fingerprint, self.seed, inputs])
        path = None if self.folder is None else self.folder / f"{name + (kind and '-' + kind)}.safetensors"
        if path is not None and path.is_file():
            tensors, about = read_tensors(path, STAGE)
            if about["key"] == key:
                self.seconds[name] = about["seconds"]
                return tensors, about["result"]
        started = time.perf_counter()
        tensors, result = make()
        if path is not None:
            seconds = time.perf_counter() - started
            write_tensors(path, tensors, STAGE, {"key": key, "result": result, "seconds": seconds})
        return tensors, result

    def _learn_encoder(self) -> dict[str, Tensor]:
        """What training changed in the encoder; nothing where there is nothing to learn from."""
        config = self.config.encoder
        pairs = training_pairs(self.rest, self.edits)

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            centre(self.encoder, [pair.original for pair in pairs[:512]])
            with track(training_length(pairs, config), "training the encoder", "prompts", self.show) as advance:
                losses = train_encoder(self.encoder, pairs, config, self.seed, advance)
            return self.encoder.state(), {"losses": losses[-10:]}

        if not pairs or config.epochs == 0:
            centre(self.encoder, [edit.prompt for edit in self.edits[:512]])
            return self.encoder.state()
        state, _ = self._kept("encoder", [config.model_dump(), pairs], make)
        self.encoder.load(state)
        return state

    def _vectors(self, prompts: Sequence[str], label: str) -> Tensor:
        if not prompts:
            return torch.empty(0, 0)
        with track(len(prompts), label, "prompts", self.show) as advance:
            return self.encoder(prompts, advance)

    def _fit(self) -> tuple[Tensor, Tensor, Tensor]:
        """(initial, flat, solved), fitted chunk by chunk; the file grows with every chunk."""
        config = self.config.fit
        sequences = fit_sequences(
            self.model, [e.prompt for e in self.edits], [e.target_new for e in self.edits], config
        )
        names = [_name(sequence) for sequence in sequences]
        key = _digest([self.fingerprint, self.seed, config.model_dump(), self.layer])
        known = KnownNeurons.read(self.folder, key)
        if known.initial is None and self.base is not None:
            self._take_over(known, self.base)
        if known.initial is None:
            known.initial = shared_start(self.model, self.form, sequences, self.layer, config, self.seed)
        missing = [i for i in range(len(names)) if names[i] not in known.place]
        with track(len(missing), "fitting neurons", "edits", self.show) as advance:
            for start in range(0, len(missing), CHUNK):
                part = missing[start : start + CHUNK]
                begun = time.perf_counter()
                fitted = fit_neurons(
                    self.model, [sequences[i] for i in part], self.form, known.initial, self.layer, config, advance
                )
                known.add([names[i] for i in part], fitted.flat, fitted.solved, time.perf_counter() - begun)
                known.write(self.folder, key)
        self.seconds["neurons"] = known.seconds
        index = torch.tensor([known.place[name] for name in names])
        return known.initial, known.flat[index], known.solved[index]

    def _take_over(self, known: KnownNeurons, base: Store) -> None:
        config = self.config.fit
        if base.fingerprint == self.fingerprint and base.layer == self.layer and base.config.fit == config:
            _, prompts, targets = zip(*base.facts, strict=True)
            sequences = fit_sequences(self.model, prompts, targets, config)
            known.initial = base.initial
            known.add([_name(sequence) for sequence in sequences], base.neurons, base.solved, 0.0)

    def _background(self) -> list[str]:
        """Prompts of facts that are not edited, none of which the edits or the development slice ask about."""
        reserved = {p.prompt for edit in (*self.edits, *self.development) for p in edit.locality}
        texts = [text for e in self.rest for text in (e.prompt, *(p.prompt for p in e.locality[:1]))]
        return [text for text in dict.fromkeys(texts) if text not in reserved]

    def _learn_gate(self, vectors: Tensor, solved: Tensor) -> tuple[float, dict[str, Tensor]]:
        """(threshold, tensors of the network). Edits whose fit failed are not learned: to the gate they are unknown."""
        config = self.config.gate
        inputs = [
            config.model_dump(),
            _hash_tensor(vectors),
            solved.tolist(),
            self._background(),
            _prompts(self.development),
        ]

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            threshold, net = self._make_gate(vectors[solved])
            return ({} if net is None else dict(net.net.state_dict())), {"threshold": threshold}

        if config.kind != "familiarity":
            threshold, _ = self._make_gate(vectors)
            return threshold, {}
        tensors, result = self._kept("gate", inputs, make)
        return float(result["threshold"]), tensors

    def _make_gate(self, vectors: Tensor) -> tuple[float, Familiarity | None]:
        config = self.config.gate
        learns = config.kind == "familiarity"
        slice_ = self._slice() if config.threshold is None and config.kind != "none" else None
        background = self._vectors(self._background(), "reading other prompts") if learns and self.rest else None
        with track(
            (1 + (slice_ is not None)) * config.epochs, "learning prompts by heart", "epochs", self.show
        ) as seen:
            net = train_familiarity(vectors, config, self.seed, background, seen) if learns else None
            if slice_ is None:
                return BLIND[config.kind] if config.threshold is None else config.threshold, net
            if learns:
                judge = train_familiarity(slice_[0], config, self.seed, background, seen)
                # A few development records are told apart far below what training brings the edits to.
                return max(config.sure, choose_threshold(*(judge(part) for part in slice_))), net
        return choose_threshold(*(1 - nearest(part, slice_[0])[0] for part in slice_)), net

    def _slice(self) -> list[Tensor] | None:
        """Vectors of the development slice's prompts, their paraphrases, and prompts that must not change."""
        if self._read is not None:
            return self._read
        asked = [e for e in self.development if e.rephrase_prompts and e.locality]
        # As many as there are edits: among more, every prompt finds a closer neighbour.
        asked = asked[: max(SMALLEST_SLICE, len(self.edits))]
        if not asked:
            return None
        texts = [(e.prompt, e.rephrase_prompts[0], e.locality[0].prompt) for e in asked]
        self._read = [self._vectors(part, "reading the development slice") for part in zip(*texts, strict=True)]
        return self._read

    def _shifts(self) -> Tensor | None:
        """What other wordings add to a vector, (n, width), on the development slice, which the encoder has not seen."""
        slice_ = self._slice() if self.config.generator.rewording > 0 else None
        return None if slice_ is None else self.config.generator.rewording * (slice_[1] - slice_[0])

    def _learn_generator(self, vectors: Tensor, initial: Tensor, flat: Tensor, solved: Tensor) -> dict[str, Tensor]:
        """Tensors of the generator, trained on the neurons whose fit succeeded; nothing for look-up."""
        config = self.config.generator
        if config.kind == "lookup":
            return {}
        development = _prompts(self.development)
        inputs = [config.model_dump(), _hash_tensor(vectors), _hash_tensor(flat), solved.tolist(), development]

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            conditions, targets = vectors[solved], flat[solved]
            if config.zero_ratio > 0:
                unrelated = self._vectors(self._background(), "reading other prompts")
                conditions, targets = with_zeros(conditions, targets, unrelated, config.zero_ratio)
            scale = Scale.of(flat[solved])
            noise = start_noise(flat.shape[1], self.seed)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                run = Training.start(make_net(config, vectors.shape[1], flat.shape[1]), config, self.seed)
                self._train(run, conditions, scale, targets, noise, _digest(inputs), solved)
            net = {f"net.{name}": value for name, value in run.average.state_dict().items()}
            fixed = {"scale.mean": scale.mean, "scale.deviation": scale.deviation, "noise": noise}
            shape = {"condition": torch.tensor(vectors.shape[1])}
            return {**net, **fixed, **shape}, {"epochs": run.epoch, "loss": run.losses[-1]}

        tensors, _ = self._kept("generator", inputs, make, config.kind)
        return tensors

    def _train(
        self, run: Training, vectors: Tensor, scale: Scale, flat: Tensor, noise: Tensor, key: str, solved: Tensor
    ) -> None:
        config = self.config.generator
        path = None if self.folder is None else self.folder / f"generator-{config.kind}.part"
        if path is not None and path.is_file():
            saved = torch.load(path, weights_only=True)
            if saved["key"] == key:
                run.load(saved["state"])
        small, shifts = scale.shrink(flat), self._shifts()
        judge = self._judge(vectors, shifts, scale, noise, solved)
        with track(config.epochs, "training the generator", "epochs", self.show) as advance:
            advance(run.epoch)
            while run.epoch < config.epochs:
                train_epoch(run, vectors, small, config, shifts)
                advance(1)
                if judge_every(run, config.judge_every, judge, config.good_enough):
                    break
                # What is saved has been judged, so that a run that goes on from it stops where the other would have.
                if run.epoch % config.judge_every == 0 and path is not None:
                    # Whole or not at all: a run may be killed while it writes.
                    fresh = path.with_suffix(".new")
                    torch.save({"key": key, "state": run.state()}, fresh)
                    fresh.replace(path)
        if path is not None:
            path.unlink(missing_ok=True)

    def _judge(
        self, vectors: Tensor, shifts: Tensor | None, scale: Scale, noise: Tensor, solved: Tensor
    ) -> Callable[[nn.Module], float]:
        """What stops training: the share of some edits whose neuron, drawn for another wording's vector, gives the
        answer to their own prompt under teacher forcing."""
        fitted = solved.nonzero().flatten()
        picked = torch.unique(torch.linspace(0, len(fitted) - 1, min(JUDGED, len(fitted))).long())
        asked = [self.edits[int(i)] for i in fitted[picked]]
        sequences = fit_sequences(self.model, [e.prompt for e in asked], [e.target_new for e in asked], self.config.fit)
        judge, steps = Solves(self.model, self.form, sequences, self.layer), self.config.generator.sampler_steps

        asked_for = vectors[picked]
        if shifts is not None:
            asked_for = F.normalize(asked_for + shifts[torch.arange(len(picked)) % len(shifts)], dim=1)

        def share(net: nn.Module) -> float:
            found = judge(Generator(net, scale, noise, steps)(asked_for))
            return sum(found) / len(found)

        return share


def split_others(
    others: Sequence[Edit], edits: Sequence[Edit], development: Sequence[Edit] | None = None
) -> tuple[list[Edit], list[Edit]]:
    """(rest, development) of records that are not edited; no subject of the edits is in them, and none twice.

    development: what to choose on; None = every fourth of the others"""
    seen = {edit.subject.casefold() for edit in edits}
    if development is None:
        kept = _new_subjects(others, seen)
        return [record for i, record in enumerate(kept) if i % 4 != 3], kept[3::4]
    chosen = _new_subjects(development, seen)
    return _new_subjects(others, seen), chosen


def _new_subjects(records: Sequence[Edit], seen: set[str]) -> list[Edit]:
    kept = []
    for record in records:
        if record.subject.casefold() not in seen:
            seen.add(record.subject.casefold())
            kept.append(record)
    return kept


def _prompts(edits: Sequence[Edit]) -> list[Any]:
    return [[e.prompt, list(e.rephrase_prompts), [p.prompt for p in e.locality]] for e in edits]


def _name(sequence: TokenSequence) -> str:
    return _digest([sequence.ids, sequence.scored, sequence.targets])


def _digest(inputs: Any) -> str:
    return hashlib.sha256(json.dumps(inputs, default=str).encode()).hexdigest()


def _hash_tensor(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
