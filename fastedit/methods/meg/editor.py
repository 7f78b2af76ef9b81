"""MeG for users: a model, its edits beside it, and nothing written into any weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastedit.methods.meg.config import CONFIGS, MegConfig
from fastedit.methods.meg.metrics import Reference, SixMetrics, ask_base, measure
from fastedit.methods.meg.serve import Server
from fastedit.methods.meg.stages import Stages
from fastedit.methods.meg.store import Store
from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import FAMILIES, Family
from fastedit.model.load import load_model
from fastedit.records.check import check_edits
from fastedit.records.edit import Edit, EditSet, Problem


@dataclass(frozen=True)
class MegRun:
    """One call of `MeG.edit`: the edits that are served now, the ids of those whose fit failed, seconds per stage, the
    gate's threshold, and why edits were left out."""

    edits: EditSet
    failed: tuple[int | str | None, ...]
    seconds: dict[str, float]
    threshold: float
    skipped: tuple[Problem, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "n_edits": len(self.edits),
            "failed": list(self.failed),
            "seconds": self.seconds,
            # JSON has no infinity, which is the bound of a gate that lets everything in.
            "threshold": self.threshold if math.isfinite(self.threshold) else None,
            "skipped": [str(problem) for problem in self.skipped],
        }


class MeG:
    """Edits a model by giving each prompt about an edit a neuron of its own, from a generator, behind a gate.

    No weight changes: without this object the model is what it was. See docs/meg.md for when that is worth its cost.

    model: an adapter, or use `MeG.from_pretrained` or `MeG.from_model`
    method: "meg", or "meg-lookup", the control that serves the stored neuron of the nearest edit
    config: settings; default: the method's
    """

    def __init__(
        self,
        model: ModelAdapter,
        method: str = "meg",
        config: MegConfig | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        if method not in CONFIGS:
            raise ValueError(f"method must be one of {', '.join(CONFIGS)}, got {method!r}")
        self.model, self.method, self.config = model, method, config or CONFIGS[method]
        if not isinstance(self.config, MegConfig):
            raise TypeError(f"{method} needs a MegConfig, got {type(self.config).__name__}")
        self.seed, self.progress = seed, progress
        self._server: Server | None = None
        self._edits: EditSet | None = None
        self._reference: tuple[list[Edit], Reference] | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        dtype: str = "float32",
        device: str | Mapping[str, int | str] = "cpu",
        families: Sequence[Family] = FAMILIES,
        **options: Any,
    ) -> MeG:
        """Load `source`, see :func:`fastedit.model.load.load_model`; options: those of `MeG`."""
        return cls(load_model(source, dtype, device, families), **options)

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any, families: Sequence[Family] = FAMILIES, **options: Any) -> MeG:
        """For a model and tokenizer that are already loaded; options: those of `MeG`."""
        adapter = ModelAdapter(model, tokenizer, families)
        adapter.check_forward()
        return cls(adapter, **options)

    @property
    def server(self) -> Server:
        """What decides and decodes. Raises ValueError before the first edit."""
        if self._server is None:
            raise ValueError("nothing is edited yet: call edit() or load() first")
        return self._server

    @property
    def store(self) -> Store:
        """The edits as they are served; `save` writes it."""
        return self.server.store

    def edit(
        self,
        edits: Sequence[Edit],
        others: Sequence[Edit] = (),
        work_dir: str | Path | None = None,
        on_invalid: str = "refuse",
        development: Sequence[Edit] | None = None,
    ) -> MegRun:
        """Make all `edits` known at once, in place of those known before; neurons of edits that stay are kept.

        others: records that are not edited, with paraphrases and unrelated prompts, a few times as many as edits if
            possible: the encoder learns from them, and the gate's threshold is chosen on a quarter of them. Without any
            the encoder stays as it is and the threshold is a guess
        work_dir: folder in which each stage is kept: the same call goes on where it was stopped, and a call with more
            edits fits the new ones alone (encoder, gate and generator know the whole set and are made again)
        on_invalid: as in `Editor.edit`
        development: what the threshold is chosen on, in place of a quarter of the others"""
        checked = check_edits(
            edits,
            len(edits) or 1,
            tokenizer=self.model.tokenizer,
            max_positions=self.model.max_positions,
            template_tokens=len(self.model.tokenizer(self.config.fit.template)["input_ids"]) + 2,
            on_invalid=on_invalid,
        )
        batch = checked.batches[0]
        base = None if self._server is None else self._server.store
        stages = Stages(self.model, batch, others, development, self.config, self.seed, work_dir, self.progress, base)
        store = stages.store()
        self._server, self._edits = Server(self.model, store, stages.encoder), batch
        failed = tuple(edit.case_id for edit, ok in zip(batch, store.solved.tolist(), strict=True) if not ok)
        return MegRun(batch, failed, store.seconds, store.threshold, checked.skipped)

    def ask(self, prompts: Sequence[str], n_tokens: int | None = None) -> list[str]:
        """Greedy answers to bare prompts, without the prompts."""
        return self.server.answer(prompts, n_tokens)

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """transformers' `generate` on the edited model; see `Server.generate`."""
        return self.server.generate(input_ids, attention_mask, **options)

    def measure(self, edits: Sequence[Edit] | None = None) -> tuple[SixMetrics, SixMetrics]:
        """The six numbers of (the unedited model, the edited one); default: of the edits of this session."""
        asked = self._edits if edits is None else edits
        if asked is None:
            raise ValueError("measure: a store holds no paraphrases; pass the edits")
        config, layer = self.config, self.store.layer
        options = (self.config.fit.template, config.max_new_tokens)
        reference = self._answers(list(asked))
        before, after = (
            measure(server, self.model, asked, reference, *options, layer, self.progress)
            for server in (None, self.server)
        )
        return before, after

    def save(self, path: str | Path) -> None:
        """Write the store, one safetensors file; the model is not in it."""
        self.store.save(path)

    def load(self, path: str | Path) -> None:
        """Serve a store that `save` wrote. Raises BadStore when it belongs to other weights."""
        store = Store.load(path)
        self._server, self._edits, self.config = Server(self.model, store), None, store.config

    def _answers(self, edits: list[Edit]) -> Reference:
        """What the base model says to these edits' questions, asked once."""
        if self._reference is None or self._reference[0] != edits:
            config = self.config
            found = ask_base(self.model, edits, config.fit.template, config.max_new_tokens, self.progress)
            self._reference = (edits, found)
        return self._reference[1]
