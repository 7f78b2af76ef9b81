"""What an editor writes into a run directory and reads back: who the model was, every batch, what was taken back.

Kinds of record, in the words of `runlog`:
    run        settings, seed, identity of the model, what the recipe prepared (templates, second moments), versions
    stream     one call of `Editor.edit`: how many batches of which edits
    batch      a committed batch: what was written, what the state keeps of it (keys), values, the edits, the report
    rejected   a batch that was rolled back, and why
    rewind     the first `keep` live batches stay, then the batches of the records `then` come to life
    snapshot   edited weights and state after the first `live` live batches, which bounds what a replay reads
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastedit.config import EditConfig
from fastedit.methods.base import State
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.model.load import load_model
from fastedit.records.edit import Edit, EditSet
from fastedit.runs.log import LockedRun, Record, RunError, RunLog
from fastedit.runs.reports import BatchReport
from fastedit.runtime.hashing import canonical, tensor_bytes, tensors_hash
from fastedit.weights.trial import Trial, rewrite

if TYPE_CHECKING:
    from fastedit.weights.editable import EditableWeights

log = logging.getLogger(__name__)

# A snapshot is written when the batches since the last one weigh this many times as much.
SNAPSHOT_SHARE = 4
SAMPLED = 1024


class WrongModel(RunError):
    """The model is not the one that the run began with."""


class Recorder:
    """One run directory, as an editor uses it. Records are appended inside `self.log.writing()` only."""

    def __init__(self, runlog: RunLog) -> None:
        self.log = runlog
        if not runlog.records or runlog.records[0].kind != "run":
            raise RunError(f"{runlog.folder}: its first record does not describe a run")

    @classmethod
    def create(cls, folder: str | Path, header: Mapping[str, Any]) -> Recorder:
        """Begin a run in an empty or absent folder."""
        runlog = RunLog.create(folder)
        with runlog.writing():
            runlog.append("run", header)
        return cls(runlog)

    @classmethod
    def open(cls, folder: str | Path) -> Recorder:
        """A run that exists; mended where a crash left something, unless it is locked or not ours to write."""
        runlog = RunLog(folder)
        with contextlib.suppress(LockedRun, PermissionError), runlog.writing():
            pass
        return cls(runlog)

    @property
    def header(self) -> Mapping[str, Any]:
        """What the first record says."""
        return self.log.records[0].body

    @property
    def method_name(self) -> str:
        """Name of the method."""
        return str(self.header["settings"]["method"])

    def config(self, config_class: type[EditConfig]) -> EditConfig:
        """The method's settings."""
        return config_class.model_validate(self.header["settings"]["config"])

    @property
    def seed(self) -> int:
        """The editor's seed."""
        return int(self.header["settings"]["seed"])

    @property
    def text(self) -> Path | None:
        """The text of the second moments; None = sampled from the model."""
        text = self.header["moments_text"]
        return None if text is None else Path(text)

    def load_model(self) -> ModelAdapter:
        """The unedited model, from where it was loaded when the run began. Raises RunError when that is not known."""
        about = self.header["model"]
        if about["source"] is None:
            raise RunError(f"{self.log.folder}: its model was handed over loaded; hand it over again")
        return load_model(about["source"], about["dtype"])

    @property
    def live(self) -> list[Record]:
        """Records of the batches that are in force, in the order in which they are written."""
        found: list[Record] = []
        for record in self.log.records:
            if record.kind == "batch" and not record.body["pending"]:
                found.append(record)
            elif record.kind == "rewind":
                found = found[: record.body["keep"]] + [self.log.records[number] for number in record.body["then"]]
        return found

    @property
    def streams(self) -> list[Record]:
        """Records of the streams."""
        return [record for record in self.log.records if record.kind == "stream"]

    def begin(
        self, batches: Sequence[EditSet], about: Mapping[str, Any], resume: bool
    ) -> tuple[list[BatchReport], list[Edit]]:
        """Start a stream, or with `resume` go on with the last one, when it is of the same edits: the reports of the
        batches it has behind it, and their edits that are in force.

        Raises RunError when the last one is of other edits and not at its end."""
        content = stream_hash(batches)
        last = self.streams[-1] if self.streams else None
        if resume and last is not None:
            reached = self.reached
            if last.body["edits_sha256"] == content:
                reports = [BatchReport.from_record(reached[number].body["report"]) for number in sorted(reached)]
                ids = {each["case_id"] for record in self.live for each in record.body["edits"]}
                return reports, [edit for n in sorted(reached) for edit in batches[n] if edit.case_id in ids]
            if len(reached) < last.body["n_batches"]:
                raise RunError(
                    f"{self.log.folder}: stopped before batch {len(reached)} of {last.body['n_batches']} of other"
                    " edits, or the same ones in batches of another size; resume it with those"
                )
        self.log.append("stream", {"edits_sha256": content, "n_batches": len(batches), **about})
        return [], []

    @property
    def reached(self) -> dict[int, Record]:
        """Batch number -> its record, of all batches that the last stream has behind it, also those taken back since.
        A batch that stopped it is tried again."""
        stream = self.streams[-1].number
        return {
            record.body["batch"]: record
            for record in self.log.records
            if record.kind in ("batch", "rejected") and record.body["stream"] == stream
            if not record.body["pending" if record.kind == "batch" else "stopped"]
        }

    @property
    def token_budget(self) -> int | None:
        """The budget that the last batch needed."""
        budgets = [record.body["report"]["token_budget"] for record in self.log.records if record.kind == "batch"]
        return budgets[-1] if budgets else None

    def check(self, model: ModelAdapter, weights: EditableWeights, settings: Mapping[str, Any]) -> None:
        """Raise WrongModel for another model, RunError for other settings, DamagedRun for other bytes."""
        check_model(self.header, model, weights)
        check_settings(self.header, settings)
        self.log.verify()

    def commit(
        self,
        number: int,
        edits: Sequence[Edit],
        trial: Trial,
        kept: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        report: Mapping[str, Any],
        replaced: Record | None = None,
    ) -> Record:
        """Write a batch; when this returns it is committed. kept: of it in the state; values: what a later solve can
        start from; replaced: the record of an earlier batch, in place of which it waits for a `rewind`."""
        tensors = {f"written/{name}": each for name, each in trial.written().items()}
        tensors |= {f"kept/{name}": each for name, each in kept.items()}
        tensors |= {f"values/{name}": each for name, each in values.items()}
        tensors["edits"] = _as_tensor(canonical([edit.model_dump(mode="json") for edit in edits]))
        body = {
            "stream": self.streams[-1].number if replaced is None else replaced.body["stream"],
            "batch": number,
            "edits": [{"case_id": edit.case_id, "sha256": edit_hash(edit)} for edit in edits],
            "weights": {layer: trial.weights.layer_hash(layer) for layer in sorted(trial.touched)},
            "report": report,
            "pending": replaced is not None,
        }
        return self.log.append("batch", body, {name: each.cpu().contiguous() for name, each in tensors.items()})

    def reject(self, number: int, report: Mapping[str, Any], skipped: bool) -> None:
        """Note a batch that was rolled back. skipped: the stream goes on without it."""
        body = {"stream": self.streams[-1].number, "batch": number, "report": report, "stopped": not skipped}
        self.log.append("rejected", body)

    def rewind(self, keep: int, then: Sequence[Record] = ()) -> None:
        """Take back all but the first `keep` live batches, and bring pending ones to life."""
        self.log.append("rewind", {"keep": keep, "then": [record.number for record in then]})

    def snapshot_if_due(self, weights: EditableWeights, state: State[Any]) -> None:
        """Write a snapshot when enough was written since the last one. A failure is a warning: nothing needs it."""
        held = state.tensors()
        changed = {layer: weights.changed(layer) for layer in weights.layers}
        size = sum(each.nbytes for each in held.values())
        for layer, index in changed.items():
            d_model, d_ff = weights.current(layer).shape
            size += d_model * (d_ff if index is None else len(index)) * weights.working_dtype(layer).itemsize
        since = 0
        for record in reversed(self.log.records):
            if record.kind == "snapshot":
                break
            since += record.size if record.kind == "batch" else 0
        if since < SNAPSHOT_SHARE * size:
            return
        tensors = {}
        for layer, index in changed.items():
            tensors[f"weight/{layer}"] = weights.stored(layer, index).cpu().contiguous()
            if index is not None:
                tensors[f"columns/{layer}"] = index.cpu()
        tensors |= {f"state/{name}": each.cpu().contiguous() for name, each in held.items()}
        live = self.live
        try:
            self.log.append("snapshot", {"live": len(live), "last": live[-1].number}, tensors)
        except OSError as error:
            log.warning("no snapshot: %s", error)

    def replay_weights(self, weights: EditableWeights, upto: int | None = None) -> None:
        """Bring the original weights to what they were after the first `upto` live batches (None = all).

        Raises DamagedRun. Warns when the bits are not those that were written, as on another kind of machine."""
        live = self.live[:upto]
        weights.reset()
        start = self._snapshot(live)
        if start is not None:
            held = self.log.tensors(start.number)
            for layer, values in _part(held, "weight/").items():
                weights.put(int(layer), held.get(f"columns/{layer}"), values)
        for record in live[start.body["live"] if start else 0 :]:
            rewrite(weights, _part(self.log.tensors(record.number), "written/"))
        wanted = {int(layer): each for record in live for layer, each in record.body["weights"].items()}
        other = [layer for layer, each in wanted.items() if weights.layer_hash(layer) != each]
        if other:
            log.warning(
                "%s: replayed, but layers %s are not bit for bit those that were written: another machine, library"
                " or number of threads rounds differently",
                self.log.folder,
                other,
            )

    def replay_state(self, state: State[Any], upto: int | None = None) -> None:
        """Bring a method's state to what it was after the first `upto` live batches (None = all)."""
        live = self.live[:upto]
        start = self._snapshot(live)
        state.load({} if start is None else _part(self.log.tensors(start.number), "state/"))
        for record in live[start.body["live"] if start else 0 :]:
            state.take_in(_part(self.log.tensors(record.number), "kept/"))

    def edits(self, record: Record) -> EditSet:
        """The edits of a batch's record."""
        text = self.log.tensors(record.number)["edits"].numpy().tobytes()
        return EditSet(tuple(Edit(**fields) for fields in json.loads(text)))

    def values(self, record: Record) -> dict[str, Tensor]:
        """What writing a batch anew can start from: `Result.tensors` of its record."""
        return _part(self.log.tensors(record.number), "values/")

    def _snapshot(self, live: Sequence[Record]) -> Record | None:
        """The last snapshot on the way to these batches."""
        for record in reversed(self.log.records):
            n_live = record.body.get("live", 0) if record.kind == "snapshot" else 0
            if 0 < n_live <= len(live) and live[n_live - 1].number == record.body["last"]:
                return record
        return None


def describe_run(
    model: ModelAdapter,
    weights: EditableWeights,
    settings: Mapping[str, Any],
    prepared: Mapping[str, Any],
    moments: object = None,
) -> dict[str, Any]:
    """The body of a run's first record. settings: method, config, seed; prepared: the state's `describe()`; moments: as
    given to the editor."""
    text = moments.path if isinstance(moments, Source) else None
    return {
        "moments_text": None if text is None else str(text.resolve()),
        "settings": json.loads(canonical(settings)),
        "prepared": prepared,
        "model": identity(model, weights),
        "machine": machine(),
    }


def identity(model: ModelAdapter, weights: EditableWeights) -> dict[str, Any]:
    """What tells one model from another: hashes of the weights to be edited as they were before any edit, of a sample
    of all others, and of the tokenizer."""
    edited = {model.weight_name(layer) for layer in weights.layers}
    digest = hashlib.sha256()
    for name, tensor in model.model.state_dict().items():
        if name in edited:
            continue
        flat = tensor.detach().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor_bytes(flat[:: max(1, flat.numel() // SAMPLED)]))
    spoken = json.loads(model.tokenizer.backend_tokenizer.to_str())
    # Set by the last call, not by the tokenizer.
    spoken = {name: part for name, part in spoken.items() if name not in ("padding", "truncation")}
    return {
        "class": type(model.model).__name__,
        "source": model.source,
        "dtype": str(model.dtype).removeprefix("torch."),
        "edited": {str(layer): tensors_hash({"weight": weights.original(layer)}) for layer in weights.layers},
        "other": digest.hexdigest(),
        "tokenizer": hashlib.sha256(canonical(spoken).encode()).hexdigest(),
    }


def machine() -> dict[str, Any]:
    """What the bits of a result depend on beside the model."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "safetensors": version("safetensors"),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def check_model(header: Mapping[str, Any], model: ModelAdapter, weights: EditableWeights) -> None:
    """Raise WrongModel, saying what differs, unless this is the model the run began with, unedited."""
    was, now = header["model"], identity(model, weights)
    wrong = [f"{name} is {now[name]!r}, was {was[name]!r}" for name in ("class", "dtype") if now[name] != was[name]]
    layers = sorted({*was["edited"], *now["edited"]}, key=int)
    differ = [layer for layer in layers if was["edited"].get(layer) != now["edited"].get(layer)]
    wrong += [f"the weights of layers {', '.join(differ)} differ"] if differ else []
    wrong += ["weights that are not edited differ"] if was["other"] != now["other"] else []
    wrong += ["the tokenizer differs"] if was["tokenizer"] != now["tokenizer"] else []
    if wrong:
        raise WrongModel(f"not the model that the run began with ({was['source'] or 'unnamed'}): {'; '.join(wrong)}")


def check_settings(header: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise RunError naming every setting that is not the run's; warn where the machine is another one."""
    was, now = _flat(header["settings"]), _flat(json.loads(canonical(settings)))
    differ = [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
    if differ:
        shown = "; ".join(f"{name} is {now.get(name)!r}, was {was.get(name)!r}" for name in differ)
        raise RunError(f"other settings than the run's: {shown}")
    before, here = header["machine"], machine()
    changes = [f"{name} {here[name]} instead of {before[name]}" for name in here if here[name] != before.get(name)]
    if changes:
        log.warning("results may differ in their last bits from an uninterrupted run: %s", ", ".join(changes))


def edit_hash(edit: Edit) -> str:
    """SHA-256 of a record's content."""
    return hashlib.sha256(canonical(edit.model_dump(mode="json")).encode()).hexdigest()


def stream_hash(batches: Sequence[Sequence[Edit]]) -> str:
    """SHA-256 over all records and the batches they are in."""
    return hashlib.sha256(canonical([[edit_hash(edit) for edit in batch] for batch in batches]).encode()).hexdigest()


def _flat(data: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {place.removeprefix("."): data}
    return {name: each for key, part in data.items() for name, each in _flat(part, f"{place}.{key}").items()}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def _as_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode("ascii")), dtype=torch.uint8)
