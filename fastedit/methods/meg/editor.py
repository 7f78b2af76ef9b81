"""`MeG`, the public object: a model with edits beside it. No weight is written."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fastedit.config import changed
from fastedit.methods.meg.config import CONFIGS, MegConfig, MethodName, method_name, method_of
from fastedit.methods.meg.metrics import Reference, SixMetrics, ask_base, measure
from fastedit.methods.meg.serve import Server
from fastedit.methods.meg.stages import Stages
from fastedit.methods.meg.store import Store
from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import FAMILIES, Family
from fastedit.model.load import Dtype, load_model
from fastedit.records.check import check_edits
from fastedit.records.edit import Edit, EditSet, InvalidEdits, Problem
from fastedit.runtime.progress import Show


@dataclass(frozen=True, repr=False)
class MegRun:
    """One call of `MeG.edit`.

    method, model: name of the method, and of the model
    edits: the edits of this call; n_in_force: how many edits are in force after it, earlier ones included
    failed: case ids of edits of this call whose fit failed
    seconds: time spent in each stage; a stage that was read from `work_dir` counts what it took when it was made
    threshold: of the gate, an entropy in nats or a cosine distance
    skipped: what was wrong with the edits that were left out
    """

    method: MethodName
    model: str
    edits: EditSet
    n_in_force: int
    failed: tuple[int | str | None, ...]
    seconds: dict[str, float]
    threshold: float
    skipped: tuple[Problem, ...] = ()

    def __repr__(self) -> str:
        return (
            f"MegRun(method={self.method!r}, model={self.model!r}, {_counted(len(self.edits))} added, "
            f"{len(self.failed)} failed, {_counted(self.n_in_force)} in force)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "n_edits": len(self.edits),
            "n_in_force": self.n_in_force,
            "failed": list(self.failed),
            "seconds": self.seconds,
            # JSON has no infinity, the threshold of a gate that every prompt passes.
            "threshold": self.threshold if math.isfinite(self.threshold) else None,
            "skipped": [str(problem) for problem in self.skipped],
        }


class MeG:
    """Edits a model by giving every prompt about an edit a neuron of its own, from a generator, behind a gate.

    No weight changes: the model itself stays unedited, and only `ask`, `generate` and `server` answer with the edits.
    docs/meg.md says when that is worth its cost.

    model: an adapter; `MeG.from_pretrained` and `MeG.from_model` make one
    method: "meg", or "meg-lookup", the control that uses the stored neuron of the nearest edit
    config: the settings, or changes to the method's own, as {"generator": {"epochs": 500}}; default: the method's own
    seed: of every draw in fitting and training
    progress: whether to show progress bars; None = on a terminal
    Raises ValueError for an unknown method or setting, TypeError for a config of another method."""

    def __init__(
        self,
        model: ModelAdapter,
        method: MethodName = "meg",
        config: MegConfig | Mapping[str, object] | None = None,
        seed: int = 0,
        progress: Show = None,
    ) -> None:
        self.adapter = model
        self.method: MethodName = method_name(method)
        self.config = _config(self.method, config)
        self.seed = seed
        self.progress = progress

        self._server: Server | None = None
        # None for a store whose file holds no records.
        self._edits: EditSet | None = EditSet(())
        self._others: Sequence[Edit] | None = None
        self._development: Sequence[Edit] | None = None
        self._reference: Reference | None = None
        # What the reference answers: edits, template, number of tokens.
        self._asked: tuple[list[Edit], str, int] | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        method: MethodName = "meg",
        config: MegConfig | Mapping[str, object] | None = None,
        dtype: Dtype = "float32",
        device: str | Mapping[str, int | str] = "cpu",
        families: Sequence[Family] = FAMILIES,
        seed: int = 0,
        progress: Show = None,
    ) -> MeG:
        """Load `source` (alias, hub id, folder or GGUF file) and make a MeG object for it.

        dtype, device, families: see :func:`fastedit.model.load.load_model`; the others: see `MeG`"""
        settings = _config(method_name(method), config)

        return cls(load_model(source, dtype, device, families), method, settings, seed, progress)

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        method: MethodName = "meg",
        config: MegConfig | Mapping[str, object] | None = None,
        families: Sequence[Family] = FAMILIES,
        seed: int = 0,
        progress: Show = None,
    ) -> MeG:
        """For a transformers model and tokenizer that are already loaded.

        families: rows to look the model up in, see :class:`fastedit.model.families.Family`; the others: see `MeG`"""
        adapter = ModelAdapter(model, tokenizer, families)
        adapter.check_forward()
        return cls(adapter, method, config, seed, progress)

    def __repr__(self) -> str:
        n_edits = 0 if self._server is None else len(self._server.store)
        return f"MeG(method={self.method!r}, model={self._model_name!r}, {_counted(n_edits)} in force)"

    @property
    def model(self) -> Any:
        """The transformers model, unedited."""
        return self.adapter.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.adapter.tokenizer

    @property
    def edits(self) -> EditSet:
        """All edits in force, in the order in which they were made. Raises ValueError for a store without records."""
        if self._edits is None:
            raise ValueError("edits: this store was saved by an earlier version, which kept no records in it")
        return self._edits

    @property
    def server(self) -> Server:
        """Decides which prompts are edited, and decodes. Raises ValueError before the first edit."""
        if self._server is None:
            raise ValueError("nothing is edited yet: call edit() or load() first")
        return self._server

    @property
    def store(self) -> Store:
        """Everything the edits are served with; `save` writes it."""
        return self.server.store

    def edit(
        self,
        edits: Sequence[Edit],
        others: Sequence[Edit] | None = None,
        work_dir: str | Path | None = None,
        on_invalid: Literal["refuse", "skip"] = "refuse",
        development: Sequence[Edit] | None = None,
    ) -> MegRun:
        """Add edits to those in force, and serve them all.

        Neurons that are fitted stay as they are, bit for bit; one neuron is fitted per new edit. Gate and generator are
        trained again on all edits. The encoder is trained again only if what it learns from has changed: with other
        records, or when a new edit's subject occurs in them. A neuron belongs to a prompt, so of two edits of one
        prompt, and with that of one (prompt, subject), the later one is in force. If a call fails or is interrupted,
        the edits of the calls before it stay in force.

        others: records that are not edited, with paraphrases and unrelated prompts, ideally a few times as many as
            edits: the encoder learns from them, and the gate's threshold is chosen on a quarter of them. None: those of
            the call before. Without any, the encoder stays untrained and the threshold is a guess
        work_dir: folder in which each stage is kept: the same call continues where it was stopped, and a call with more
            edits fits the new ones only. To continue a later call, `load` the folder's meg.safetensors first
        on_invalid: as in `Editor.edit`
        development: records to choose the threshold on, instead of a quarter of the others

        Raises InvalidEdits; ValueError, before any work, if a loaded store lacks what adding needs: its records, or
        others for gate and generator when it was made with some and none are given."""
        if others is None:
            others = self._others
            development = self._development if development is None else development
        earlier = None if self._server is None else self._server.store
        if earlier is not None:
            _check_addable(earlier, self.config, others)
        _check_joins(edits)
        checked = check_edits(
            edits,
            len(edits) or 1,
            tokenizer=self.tokenizer,
            max_positions=self.adapter.max_positions,
            template_tokens=len(self.tokenizer(self.config.fit.template)["input_ids"]) + 2,
            on_invalid=on_invalid,
            needs_subject=False,
            n_embeddings=self.adapter.n_embeddings,
        )
        batch = checked.batches[0]
        in_force = joined(self.edits, batch)

        stages = Stages(
            self.adapter, in_force, others or (), development, self.config, self.seed, work_dir, self.progress, earlier
        )
        store = stages.store()

        self._server = Server(self.adapter, store, stages.encoder)
        self._edits = in_force
        self._others = others
        self._development = development
        self.method = method_of(self.config)
        return self._run(batch, checked.skipped)

    def _run(self, batch: EditSet, skipped: tuple[Problem, ...]) -> MegRun:
        """The report of a call that added `batch`."""
        store = self.store
        # The edits of the newest call are the last ones in force.
        solved = store.solved[len(store) - len(batch) :].tolist()
        failed = tuple(edit.case_id for edit, ok in zip(batch, solved, strict=True) if not ok)
        return MegRun(self.method, self._model_name, batch, len(store), failed, store.seconds, store.threshold, skipped)

    def ask(self, prompts: Sequence[str], n_tokens: int | None = None) -> list[str]:
        """Greedy answers to bare prompts, without the prompts. n_tokens: default `config.max_new_tokens`"""
        return self.server.answer(prompts, n_tokens)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """transformers' `generate` on the edited model, with its options; see `Server.generate`."""
        return self.server.generate(input_ids, attention_mask, **options)

    def measure(self, edits: Sequence[Edit] | None = None) -> tuple[SixMetrics, SixMetrics]:
        """The six numbers of (the unedited model, the edited one). edits: default all in force"""
        if edits is None and self._edits is None:
            raise ValueError("measure: this store was saved without its records; pass the edits to measure")
        asked = list(self.edits if edits is None else edits)
        layer = self.store.layer
        template, n_tokens = self.config.fit.template, self.config.max_new_tokens
        reference = self._answers(asked)

        before, after = (
            measure(server, self.adapter, asked, reference, template, n_tokens, layer, self.progress)
            for server in (None, self.server)
        )
        return before, after

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the store, one safetensors file with the edits' records in it; the model is not in it.

        force: replace a file that stands there. Raises PlaceError where one stands, NotSaved if it cannot be written"""
        self.store.save(path, force)

    def load(self, path: str | Path) -> None:
        """Serve a store that `save` wrote, instead of the edits in force; method, config and seed become those of the
        store. Raises BadStore for another file, and for a store of a model with other weights."""
        store = Store.load(path)
        self._server = Server(self.adapter, store)
        self._edits = None if store.records is None else EditSet(store.records)
        self._others = self._development = None
        self.config, self.seed, self.method = store.config, store.seed, method_of(store.config)

    @property
    def _model_name(self) -> str:
        return self.adapter.source or type(self.model).__name__

    def _answers(self, edits: list[Edit]) -> Reference:
        """The base model's answers to these edits' questions, decoded once."""
        asked = (edits, self.config.fit.template, self.config.max_new_tokens)
        if self._reference is None or self._asked != asked:
            self._reference = ask_base(self.adapter, *asked, self.progress)
            self._asked = asked
        return self._reference


def joined(earlier: EditSet, added: EditSet) -> EditSet:
    """The edits in force when `added` comes after `earlier`: of one prompt, only the later ones stay."""
    prompts = {edit.prompt for edit in added}
    return EditSet((*(edit for edit in earlier if edit.prompt not in prompts), *added))


def _check_joins(edits: Sequence[Edit]) -> None:
    """Raise InvalidEdits if an edit says what stands between prompt and target, where MeG puts its template."""
    message = "must be left out for MeG, whose setting fit.template says what stands between prompt and target"
    wrong = [
        Problem(f"{message}, got {edit.join!r}", "join", edit.case_id, source=f"edits[{at}]")
        for at, edit in enumerate(edits)
        if isinstance(edit, Edit) and edit.join is not None
    ]

    if wrong:
        raise InvalidEdits(wrong)


def _check_addable(store: Store, config: MegConfig, others: Sequence[Edit] | None) -> None:
    """Raise ValueError if edits cannot be added to a store under a config with these others."""
    if store.records is None:
        raise ValueError(
            "edit: nothing can be added to this store, since an earlier version saved it without its records; edit"
            " all of them with a new MeG object"
        )
    trains = config.gate.kind == "familiarity" or config.generator.kind != "lookup"
    if others is None and trains and store.n_others > 0:
        raise ValueError(
            f"edit: gate and generator of this store were trained with {store.n_others} other records, which it does"
            " not hold; give them again as others="
        )


def _config(method: MethodName, config: MegConfig | Mapping[str, object] | None) -> MegConfig:
    """The method's own settings, changed or replaced by `config`."""
    if config is None:
        return CONFIGS[method]
    if isinstance(config, Mapping):
        return changed(CONFIGS[method], config)
    if not isinstance(config, MegConfig):
        raise TypeError(f"{method} needs a MegConfig, got {type(config).__name__}")
    return config


def _counted(n_edits: int) -> str:
    return f"{n_edits} edit{'s' * (n_edits != 1)}"
