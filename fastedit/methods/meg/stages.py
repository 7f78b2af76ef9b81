"""The stages from edits to a store. Each is kept in a folder, so that a stopped run can be continued.

    encoder     train on pairs of facts that are not edited
    vectors     encode the edits' prompts
    neurons     fit one neuron per edit
    gate        memorise the edits' prompts; choose the threshold on the development slice
    generator   learn prompt vector -> neuron

Records that are not edited (`others`) are split by subject: the threshold is chosen on the development slice alone;
the encoder learns from the rest, and the gate learns that it does not know them. Neither shares a subject with the
edits: the published thresholds and checkpoints were chosen on the very edits that are reported.

The file of a stage is used again if its inputs are the same. Neurons are kept one by one, so a run with more edits
fits the new ones only. `earlier`, a finished store, saves the same work without a folder: neurons that were fitted in
the same way are taken from it, and so are encoder and vectors if they would come out the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastedit.methods.meg.config import MegConfig
from fastedit.methods.meg.encoder import (
    Wording,
    about,
    centre,
    nearest,
    train_encoder,
    training_length,
    training_pairs,
)
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
from fastedit.methods.meg.store import STAGE, BadStore, KnownNeurons, Store, read_tensors, write_tensors
from fastedit.model.adapter import ModelAdapter
from fastedit.model.tokens import TokenSequence
from fastedit.records.edit import Edit
from fastedit.runtime.progress import Show, track

T = TypeVar("T")

# Tensors of a stage, and its plain results for JSON.
Made = tuple[dict[str, Tensor], dict[str, Any]]

# Thresholds when there is no development slice to choose on: entropy in nats, and cosine distance.
BLIND = {"familiarity": 0.3, "cosine": 0.3, "none": float("inf")}

# Edits fitted between two saves.
CHUNK = 128

# Edits that a generator is judged on.
JUDGED = 128

# Development records that are used at least, if there are as many.
SMALLEST_SLICE = 64


class Stages:
    """One run from edits to a store: `store` does what is not done yet.

    edits: all edits that the store will hold
    others, development: records that are not edited, see `split_others`
    folder: where stages are kept; None = nowhere
    show: whether to show progress bars; None = on a terminal
    earlier: a store whose neurons, encoder and vectors are used again where nothing about them has changed
    """

    def __init__(
        self,
        model: ModelAdapter,
        edits: Sequence[Edit],
        others: Sequence[Edit] = (),
        development: Sequence[Edit] | None = None,
        config: MegConfig | None = None,
        seed: int = 0,
        folder: str | Path | None = None,
        show: Show = None,
        earlier: Store | None = None,
    ) -> None:
        self.model = model
        self.edits = list(edits)
        self.config = config or MegConfig()
        self.seed = seed
        self.folder = None if folder is None else Path(folder)
        self.show = show

        rest, self.development = split_others(others, edits, development)
        self.rest = rest[: self.config.max_others]

        self.fingerprint = model.weights_hash(model.n_layers - 1)
        # Nothing that was made for other weights can be used again.
        self.earlier = earlier if earlier is not None and earlier.fingerprint == self.fingerprint else None
        self.layer = fit_layer(self.config.fit, model.n_layers)
        self.form = NeuronForm.of(model, self.config.fit.activation)
        self.encoder = make_encoder(model, self.config.encoder)

        self.seconds: dict[str, float] = {}
        self._encoder_key = ""
        self._n_others = len(self.rest) + len(self.development)
        self._slice_vectors: list[Tensor] | None = None

    def store(self) -> Store:
        """Run the stages that are not done, and put their results together."""
        learned = self._timed("encoder", self._learn_encoder)
        vectors = self._timed("vectors", lambda: self._prompt_vectors(learned))
        initial, flat, solved = self._timed("neurons", self._fit)
        if not bool(solved.any()):
            raise ValueError("meg: no edit could be fitted; try more fit.steps, another fit.layer, or more edits")

        threshold, gate = self._timed("gate", lambda: self._learn_gate(vectors, solved))
        generator = self._timed("generator", lambda: self._learn_generator(vectors, flat, solved))

        store = Store(
            config=self.config,
            layer=self.layer,
            form=self.form,
            initial=initial,
            facts=[(edit.case_id, edit.prompt, edit.target_new) for edit in self.edits],
            neurons=flat,
            solved=solved,
            vectors=vectors,
            threshold=threshold,
            fingerprint=self.fingerprint,
            seed=self.seed,
            encoder=learned,
            gate=gate,
            generator=generator,
            seconds=self.seconds,
            records=tuple(self.edits),
            encoder_key=self._encoder_key,
            n_others=self._n_others,
        )
        if self.folder is not None:
            store.save(self.folder / "meg.safetensors", force=True)
        return store

    def _timed(self, name: str, stage: Callable[[], T]) -> T:
        started = time.perf_counter()
        made = stage()
        # A stage that was read from its file has set the time it took when it was made.
        self.seconds.setdefault(name, time.perf_counter() - started)
        return made

    def _key(self, inputs: object) -> str:
        """What a stage was made from, as a digest."""
        return _digest([self.fingerprint, self.seed, inputs])

    def _kept(self, name: str, key: str, make: Callable[[], Made], kind: str = "") -> Made:
        """A stage's tensors and plain results: read if its file was made under the same key, else made and written.

        kind: the variant of a stage; each has a file of its own, so that controls do not overwrite one another"""
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
        """What training changed in the encoder; its centre alone if there is nothing to learn from."""
        config = self.config.encoder
        pairs = training_pairs(self.rest, self.edits)
        if not pairs or config.epochs == 0:
            return self._untrained_encoder()

        key = self._encoder_key = self._key([config.model_dump(), pairs])

        def make() -> Made:
            if self.earlier is not None and self.earlier.encoder_key == key:
                return self.earlier.encoder, {}
            return self._train_encoder(pairs)

        state, _ = self._kept("encoder", key, make)
        self.encoder.load(state)
        return state

    def _train_encoder(self, pairs: Sequence[Wording]) -> Made:
        config = self.config.encoder
        centre(self.encoder, [pair.original for pair in pairs[:512]])
        with track(training_length(pairs, config), "training the encoder", "prompts", self.show) as advance:
            losses = train_encoder(self.encoder, pairs, config, self.seed, advance)
        return self.encoder.state(), {"losses": losses[-10:]}

    def _untrained_encoder(self) -> dict[str, Tensor]:
        """The encoder of the earlier store if that was trained, else the encoder as it is, centred on the edits."""
        earlier = self.earlier
        if earlier is not None and earlier.encoder_key and earlier.config.encoder == self.config.encoder:
            self._encoder_key = earlier.encoder_key
            self._n_others = self._n_others or earlier.n_others
            self.encoder.load(earlier.encoder)
            return earlier.encoder

        centre(self.encoder, [edit.prompt for edit in self.edits[:512]])
        return self.encoder.state()

    def _vectors(self, prompts: Sequence[str], label: str) -> Tensor:
        if not prompts:
            return torch.empty(0, 0)
        with track(len(prompts), label, "prompts", self.show) as advance:
            return self.encoder(prompts, advance)

    def _prompt_vectors(self, learned: dict[str, Tensor]) -> Tensor:
        """Vectors of the edits' prompts, (n, width). learned: what the encoder learned"""
        prompts = [edit.prompt for edit in self.edits]
        earlier = self.earlier
        if earlier is None or earlier.config.encoder != self.config.encoder or not _equal(earlier.encoder, learned):
            return self._vectors(prompts, "reading the prompts")

        vectors = {prompt: vector for (_, prompt, _), vector in zip(earlier.facts, earlier.vectors, strict=True)}
        missing = [prompt for prompt in prompts if prompt not in vectors]
        vectors |= zip(missing, self._vectors(missing, "reading the prompts"), strict=True)
        return torch.stack([vectors[prompt] for prompt in prompts])

    def _fit(self) -> tuple[Tensor, Tensor, Tensor]:
        """(initial, flat, solved). Fitted chunk by chunk, and the file grows with every chunk."""
        config = self.config.fit
        prompts, answers = [e.prompt for e in self.edits], [e.target_new for e in self.edits]
        sequences = fit_sequences(self.model, prompts, answers, config)
        names = [_name(sequence) for sequence in sequences]

        key = self._key_of_neurons()
        known = self._known_neurons(key)
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
        rows = known.rows(names)
        return known.initial, known.flat[rows], known.solved[rows]

    def _key_of_neurons(self) -> str:
        return _digest([self.fingerprint, self.seed, self.config.fit.model_dump(), self.layer])

    def _known_neurons(self, key: str) -> KnownNeurons:
        """Neurons of the folder and of the earlier store. Those of the store win, so that its edits keep their bits."""
        known = KnownNeurons.read(self.folder, key)
        earlier = self.earlier
        if earlier is None or earlier.layer != self.layer or earlier.config.fit != self.config.fit:
            return known

        # Neurons from another start would be of another distribution than the generator learns.
        if known.initial is None or not torch.equal(known.initial, earlier.initial):
            known = KnownNeurons(earlier.initial)
        _, prompts, targets = zip(*earlier.facts, strict=True)
        names = [_name(sequence) for sequence in fit_sequences(self.model, prompts, targets, self.config.fit)]

        def is_kept(i: int) -> bool:
            return names[i] in known.place and torch.equal(known.flat[known.place[names[i]]], earlier.neurons[i])

        new = [i for i in range(len(names)) if not is_kept(i)]
        known.add([names[i] for i in new], earlier.neurons[new], earlier.solved[new], 0.0)
        return known

    def _background(self) -> list[str]:
        """Prompts of facts that are not edited, without those that the edits or the development slice ask."""
        reserved = {p.prompt for edit in (*self.edits, *self.development) for p in edit.locality}
        texts = [text for e in self.rest for text in (e.prompt, *(p.prompt for p in e.locality[:1]))]
        return [text for text in dict.fromkeys(texts) if text not in reserved]

    def _learn_gate(self, vectors: Tensor, solved: Tensor) -> tuple[float, dict[str, Tensor]]:
        """(threshold, tensors of the network). Edits whose fit failed are left out: the gate does not know them."""
        config = self.config.gate
        if config.kind != "familiarity":
            threshold, _ = self._make_gate(vectors)
            return threshold, {}

        inputs = [
            config.model_dump(),
            _hash_tensor(vectors),
            solved.tolist(),
            self._background(),
            _prompts(self.development),
        ]

        def make() -> Made:
            threshold, net = self._make_gate(vectors[solved])
            return ({} if net is None else dict(net.net.state_dict())), {"threshold": threshold}

        tensors, result = self._kept("gate", self._key(inputs), make)
        return float(result["threshold"]), tensors

    def _make_gate(self, vectors: Tensor) -> tuple[float, Familiarity | None]:
        config = self.config.gate
        learns = config.kind == "familiarity"
        slice_ = self._slice() if config.threshold is None and config.kind != "none" else None
        background = self._vectors(self._background(), "reading other prompts") if learns and self.rest else None

        n_epochs = (1 + (slice_ is not None)) * config.epochs
        with track(n_epochs, "training the gate", "epochs", self.show) as advance:
            net = train_familiarity(vectors, config, self.seed, background, advance) if learns else None
            if slice_ is None:
                return (self._blind_threshold() if config.threshold is None else config.threshold), net
            if learns:
                judge = train_familiarity(slice_[0], config, self.seed, background, advance)
                # A few development records are told apart at entropies far below what the edits reach in training.
                return max(config.sure, choose_threshold(*(judge(part) for part in slice_))), net

        return choose_threshold(*(1 - nearest(part, slice_[0])[0] for part in slice_)), net

    def _blind_threshold(self) -> float:
        """The threshold without a development slice: of the earlier store, if its encoder and its gate are used on."""
        earlier, kind = self.earlier, self.config.gate.kind
        same_encoder = earlier is not None and earlier.encoder_key != "" and earlier.encoder_key == self._encoder_key
        if kind == "cosine" and earlier is not None and same_encoder and earlier.config.gate == self.config.gate:
            return earlier.threshold
        return BLIND[kind]

    def _slice(self) -> list[Tensor] | None:
        """Vectors of the development slice: of its prompts, of their paraphrases, and of prompts that must not
        change."""
        if self._slice_vectors is not None:
            return self._slice_vectors
        asked = [e for e in self.development if e.rephrase_prompts and e.locality]
        # As many as there are edits: among more, every prompt finds a closer neighbour.
        asked = asked[: max(SMALLEST_SLICE, len(self.edits))]
        if not asked:
            return None

        texts = [(e.prompt, e.rephrase_prompts[0], e.locality[0].prompt) for e in asked]
        self._slice_vectors = [
            self._vectors(part, "reading the development slice") for part in zip(*texts, strict=True)
        ]
        return self._slice_vectors

    def _shifts(self) -> Tensor | None:
        """Differences between the vectors of two wordings, (n, width), on the development slice, which the encoder was
        not trained on."""
        slice_ = self._slice() if self.config.generator.rewording > 0 else None
        return None if slice_ is None else self.config.generator.rewording * (slice_[1] - slice_[0])

    def _learn_generator(self, vectors: Tensor, flat: Tensor, solved: Tensor) -> dict[str, Tensor]:
        """Tensors of the generator, trained on the neurons whose fit succeeded; none for look-up."""
        config = self.config.generator
        if config.kind == "lookup":
            return {}

        development = _prompts(self.development)
        inputs = [config.model_dump(), _hash_tensor(vectors), _hash_tensor(flat), solved.tolist(), development]

        def make() -> Made:
            return self._make_generator(vectors, flat, solved, _digest(inputs))

        tensors, _ = self._kept("generator", self._key(inputs), make, config.kind)
        return tensors

    def _make_generator(self, vectors: Tensor, flat: Tensor, solved: Tensor, key: str) -> Made:
        config = self.config.generator
        conditions, targets = vectors[solved], flat[solved]
        if config.zero_ratio > 0:
            unrelated = self._vectors(self._background(), "reading other prompts")
            conditions, targets = with_zeros(conditions, targets, unrelated, config.zero_ratio)

        scale = Scale.of(flat[solved])
        noise = start_noise(flat.shape[1], self.seed)
        random = torch.Generator().manual_seed(self.seed)
        fresh = make_net(config, vectors.shape[1], flat.shape[1], random)
        run = Training.start(fresh, config, self.seed, random)
        self._train_generator(run, conditions, scale, targets, noise, key, solved)

        net = {f"net.{name}": value for name, value in run.average.state_dict().items()}
        fixed = {"scale.mean": scale.mean, "scale.deviation": scale.deviation, "noise": noise}
        shape = {"condition": torch.tensor(vectors.shape[1])}
        return {**net, **fixed, **shape}, {"epochs": run.epoch, "loss": run.losses[-1]}

    def _train_generator(
        self, run: Training, vectors: Tensor, scale: Scale, flat: Tensor, noise: Tensor, key: str, solved: Tensor
    ) -> None:
        config = self.config.generator
        path = None if self.folder is None else self.folder / f"generator-{config.kind}.part"
        if path is not None and path.is_file():
            saved = _read_unfinished(path)
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
                # Saved after it was judged, so that a continued run stops where an uninterrupted one would have.
                if run.epoch % config.judge_every == 0 and path is not None:
                    _write_unfinished(path, {"key": key, "state": run.state()})

        if path is not None:
            path.unlink(missing_ok=True)

    def _judge(
        self, vectors: Tensor, shifts: Tensor | None, scale: Scale, noise: Tensor, solved: Tensor
    ) -> Callable[[nn.Module], float]:
        """What training stops by: the share of up to JUDGED edits for which the neuron drawn for another wording's
        vector gives the answer to the edit's own prompt under teacher forcing."""
        fitted = solved.nonzero().flatten()
        picked = torch.unique(torch.linspace(0, len(fitted) - 1, min(JUDGED, len(fitted))).long())
        asked = [self.edits[int(i)] for i in fitted[picked]]
        sequences = fit_sequences(self.model, [e.prompt for e in asked], [e.target_new for e in asked], self.config.fit)
        solves = Solves(self.model, self.form, sequences, self.layer)
        steps = self.config.generator.sampler_steps

        conditions = vectors[picked]
        if shifts is not None:
            conditions = F.normalize(conditions + shifts[torch.arange(len(picked)) % len(shifts)], dim=1)

        def share(net: nn.Module) -> float:
            right = solves(Generator(net, scale, noise, steps)(conditions))
            return sum(right) / len(right)

        return share


def split_others(
    others: Sequence[Edit], edits: Sequence[Edit], development: Sequence[Edit] | None = None
) -> tuple[list[Edit], list[Edit]]:
    """(rest, development), records that are not edited: no subject of an edit occurs in them, and none occurs twice.

    development: the records to choose on; None = every fourth of the others"""
    seen = {about(edit) for edit in edits}
    if development is None:
        kept = _new_subjects(others, seen)
        return [record for i, record in enumerate(kept) if i % 4 != 3], kept[3::4]

    chosen = _new_subjects(development, seen)
    return _new_subjects(others, seen), chosen


def _new_subjects(records: Sequence[Edit], seen: set[str]) -> list[Edit]:
    """Records whose subject is not in `seen`, to which it is added."""
    kept = []
    for record in records:
        if about(record) not in seen:
            seen.add(about(record))
            kept.append(record)
    return kept


def _prompts(edits: Sequence[Edit]) -> list[list[object]]:
    """Every prompt of records, for a digest."""
    return [[e.prompt, list(e.rephrase_prompts), [p.prompt for p in e.locality]] for e in edits]


def _write_unfinished(path: Path, saved: dict[str, Any]) -> None:
    """Write the state of an unfinished training behind its SHA-256."""
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    data = buffer.getvalue()

    # Renamed when it is complete: a run may be killed while it writes.
    fresh = path.with_suffix(".new")
    fresh.write_bytes(hashlib.sha256(data).digest() + data)
    fresh.replace(path)


def _read_unfinished(path: Path) -> dict[str, Any]:
    """What `_write_unfinished` wrote. Raises BadStore for other bytes."""
    data = path.read_bytes()
    digest, data = data[:32], data[32:]
    if hashlib.sha256(data).digest() != digest:
        raise BadStore(
            f"{path}: its bytes are not those that were written (checksum differs); delete it, and train anew"
        )

    saved: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
    return saved


def _name(sequence: TokenSequence) -> str:
    return _digest([sequence.ids, sequence.scored, sequence.targets])


def _digest(inputs: object) -> str:
    return hashlib.sha256(json.dumps(inputs, default=str).encode()).hexdigest()


def _equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names and bits."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _hash_tensor(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
