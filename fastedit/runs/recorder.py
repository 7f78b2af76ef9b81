"""What an editor writes into the run log of a run directory, and reads back.

Kinds of record:
    run        settings, seed, identity of the model, what the method prepared (templates, second moments), versions
    stream     one call of `Editor.edit`: how many batches of which edits
    batch      a committed batch: what was written, what the state keeps of it (keys), values, the edits, the report;
               libraries and kernels, where they are not those of the first record
    rejected   a batch that was rolled back, and why
    rewind     from here on the first `keep` live batches are in force, then those of the records `then`
    snapshot   edited weights and state after the first `live` live batches, so that a replay need not read them all

A live batch is one that is in force: committed, and not taken back since.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch
from torch import Tensor

from fastedit.config import EditConfig
from fastedit.methods.base import AnyState
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.model.families import FAMILIES, Family
from fastedit.model.family_file import family_from
from fastedit.model.load import load_model
from fastedit.records.edit import Edit, EditSet
from fastedit.runs.fields import completed, recorded
from fastedit.runs.identity import check_model, compare_machine, identity, machine, machine_changes
from fastedit.runs.log import DamagedRun, Record, RunError, RunLog
from fastedit.runs.streams import Plan, Streams, describe_stream, edit_hash
from fastedit.runtime.hashing import canonical
from fastedit.runtime.words import counted
from fastedit.weights.trial import Trial, replay

if TYPE_CHECKING:
    from fastedit.weights.editable import EditableWeights

log = logging.getLogger(__name__)

AnyEditConfig = TypeVar("AnyEditConfig", bound=EditConfig)

# A snapshot is written when the batches since the last one weigh this many times as much as it would.
SNAPSHOT_SHARE = 4


class Settings(TypedDict):
    """What decides the results of a run besides model and edits. method: its name."""

    method: str
    config: EditConfig
    seed: int


class Recorder:
    """One run directory, as an editor uses it. Records are appended inside `self.log.writing()` only.

    keep: take only the first batches in force for live; nothing can be written then
    """

    def __init__(self, runlog: RunLog, keep: int | None = None) -> None:
        self.log = runlog
        self._keep = keep
        if not runlog.records or runlog.records[0].kind != "run":
            raise RunError(f"{runlog.folder}: its first record does not describe a run")

    @classmethod
    def create(cls, folder: str | Path, header: Mapping[str, Any]) -> Recorder:
        """Begin a run in an empty or absent folder. header: see `describe_run`"""
        runlog = RunLog.create(folder)
        with runlog.writing():
            runlog.append("run", header)
        return cls(runlog)

    @classmethod
    def open(
        cls, folder: str | Path, keep: int | None = None, up_to_damage: bool = False, quiet: bool = False
    ) -> Recorder:
        """A run that exists, as it stands on the disk: nothing is locked and nothing is written.

        keep: only the first so many batches in force are wanted; a damage after them is a warning
        up_to_damage: read the records before the first that cannot be read, see `RunLog.damage`
        quiet: warn of nothing, for a first look at a run that is opened again
        Raises DamagedRun, RunError for no run or for fewer batches than `keep`."""
        runlog = RunLog(folder, up_to_damage or keep is not None, quiet)
        if runlog.damage is not None and not runlog.records:
            raise runlog.damage

        runlog.rely()
        recorder = cls(runlog)
        return recorder if keep is None else recorder._cut(keep)

    def _cut(self, keep: int) -> Recorder:
        """The run up to its first `keep` batches in force, for reading alone."""
        count = len(self.live)
        if not 0 <= keep <= count:
            why = "" if self.log.damage is None else f"; {self.log.damage}"
            batches = counted(count, "batch is", "batches are")
            raise RunError(f"{self.log.folder}: {batches} in force, asked for the first {keep}{why}")

        if self.log.damage is not None:
            self.log.warn(f"the first {counted(keep, 'batch is', 'batches are')} read; {self.log.damage}")
        batches = counted(keep, "batch was", "batches were")
        self.log.refuse_writing(f"{self.log.folder}: only its first {batches} opened, for reading")
        return Recorder(self.log, keep)

    @property
    def header(self) -> Mapping[str, Any]:
        """The body of the first record."""
        return self.log.records[0].body

    @property
    def method_name(self) -> str:
        """Name of the method."""
        return self.header["settings"]["method"]

    def config(self, config_class: type[AnyEditConfig]) -> AnyEditConfig:
        """The method's settings. A field that the run does not hold has the value that keeps the old behaviour, see
        :mod:`fastedit.runs.fields`.

        Raises RunError naming the fields that `config_class` does not know or whose values it refuses."""
        whole = completed(config_class, self.header["settings"]["config"], "config", self.log.folder)
        try:
            return config_class(**whole)
        except ValueError as error:
            problems = "; ".join(str(error).splitlines())
            raise RunError(f"{self.log.folder}: settings that this version of fastedit refuses: {problems}") from error

    @property
    def seed(self) -> int:
        """Seed of the context templates and of sampled text."""
        return self.header["settings"]["seed"]

    @property
    def text(self) -> Path | None:
        """The text of the second moments; None when it was sampled from the model, or they were given as tensors."""
        text = self.header["moments_text"]
        return None if text is None else Path(text)

    def load_model(self, device: str | Mapping[str, int | str] = "cpu") -> ModelAdapter:
        """The unedited model, from where it was loaded when the run began. Raises RunError when that is not known.

        device: see :func:`fastedit.load_model`"""
        about = self.header["model"]
        if about["source"] is None:
            raise RunError(f"{self.log.folder}: its model was handed over loaded; hand it over again")
        return load_model(about["source"], about["dtype"], device, self.families)

    @property
    def families(self) -> Sequence[Family]:
        """The rows to look the run's model up in: one of the user's, if the run was made with it, or those that ship.

        Raises RunError for a row with a function of the user's own, which no run can hold; ValueError for a row that
        this version does not understand."""
        about = self.header["model"].get("family")
        if about is None:
            return FAMILIES
        if "row" not in about:
            raise RunError(
                f"{self.log.folder}: its family, {about['name']!r}, has a function of your own; load the model with"
                " families= in Python, and pass it as adapter="
            )

        return (family_from(about["row"], f"{self.log.folder}: the family {about['name']!r}"),)

    @property
    def live(self) -> list[Record]:
        """Records of the batches in force, in the order in which they are written."""
        live: list[Record] = []
        for record in self.log.records:
            if record.kind == "batch" and not record.body["pending"]:
                live.append(record)
            elif record.kind == "rewind":
                live = live[: record.body["keep"]] + [self.log.records[number] for number in record.body["then"]]
        return live[: self._keep]

    @property
    def streams(self) -> list[Record]:
        """Records of the streams."""
        return [record for record in self.log.records if record.kind == "stream"]

    def reached(self, stream: Record) -> dict[int, Record]:
        """Batch number -> its record, of all batches of a stream that are behind it, also those taken back since. A
        batch that stopped the stream is tried again."""
        return {
            record.body["batch"]: record
            for record in self.log.records
            if record.kind in ("batch", "rejected") and record.body["stream"] == stream.number
            if not record.body["pending" if record.kind == "batch" else "stopped"]
        }

    @property
    def token_budget(self) -> int | None:
        """The token budget of the last batch."""
        budgets = [record.body["report"]["token_budget"] for record in self.log.records if record.kind == "batch"]
        return budgets[-1] if budgets else None

    def plan(self, batches: Sequence[EditSet], batch_size: int, resume: bool) -> Plan:
        """What a call with these batches writes: a new stream, or with `resume` what the streams of the run lack.

        Raises RunError for edits that do not fit the run, see `Streams.resumed`."""
        if not resume:
            return Plan(batches, range(len(batches)), opens=0)
        return Streams(self.log, self.reached, self.live).resumed(batches, batch_size)

    def begin(self, batches: Sequence[EditSet], about: Mapping[str, Any]) -> None:
        """Start a stream of these batches. about: its batch_size and on_error"""
        body, tensors = describe_stream(batches)
        self.log.append("stream", {**body, **about}, tensors)

    def check(self, model: ModelAdapter, weights: EditableWeights, settings: Settings) -> None:
        """Raise WrongModel for another model, RunError for other settings, DamagedRun for other bytes."""
        check_model(self.header, model, weights)
        self._check_settings(settings)
        compare_machine(self.header)
        self.verify()

    def verify(self, upto: int | None = None) -> None:
        """Check every byte of every record. Raises DamagedRun naming the first file that differs and is needed by the
        first `upto` live batches (None = all); one that nothing there needs is a warning."""
        live = self.live
        needed = [self.log.records[0].number, *(record.number for record in live[:upto])]
        damaged = self.log.damaged()

        for number in needed:
            if number in damaged:
                n_sound = needed.index(number) - 1
                raise DamagedRun(f"{damaged[number]}{_ways_out(n_sound)}")
        for error in damaged.values():
            log.warning("%s; nothing in force needs it", error)

    def _check_settings(self, settings: Settings) -> None:
        """Raise RunError naming every setting that differs from the run's, with both values."""
        config_class = type(settings["config"])
        was = {"method": self.method_name, "seed": self.seed}
        now = {"method": settings["method"], "seed": settings["seed"]}

        # Another method has other settings altogether.
        if was["method"] == now["method"]:
            was["config"] = completed(config_class, self.header["settings"]["config"], "config", self.log.folder)
            now["config"] = json.loads(canonical(settings["config"].model_dump()))

        flat_was = _flat(was)
        flat_now = _flat(now)
        names = sorted({*flat_was, *flat_now})
        differ = [name for name in names if flat_was.get(name) != flat_now.get(name)]
        if differ:
            shown = "; ".join(f"{name} is {flat_now.get(name)!r}, was {flat_was.get(name)!r}" for name in differ)
            raise RunError(f"other settings than the run's: {shown}")

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
        """Write a batch; when this returns it is committed.

        kept: what the state keeps of it
        values: `Result.tensors`, from which the batch can be solved again
        replaced: the record of an earlier batch; this one takes its place with the next `rewind`, and is pending until
            then
        Raises TypeError, with nothing written, for what is no dense tensor."""
        tensors = {f"written/{name}": tensor for name, tensor in trial.written().items()}
        tensors |= {f"kept/{name}": tensor for name, tensor in kept.items()}
        tensors |= {f"values/{name}": tensor for name, tensor in values.items()}
        tensors["edits"] = _as_tensor(canonical([recorded(edit) for edit in edits]))

        body = {
            "stream": self.streams[-1].number if replaced is None else replaced.body["stream"],
            "batch": number,
            "edits": [{"case_id": edit.case_id, "sha256": edit_hash(edit)} for edit in edits],
            "weights": {layer: trial.weights.layer_hash(layer) for layer in sorted(trial.touched)},
            "report": report,
            "pending": replaced is not None,
        }
        changes = machine_changes(self.header)
        if changes:
            body["made_with"] = {name: now for name, (now, _) in changes.items()}
        return self.log.append("batch", body, _storable(tensors))

    def reject(self, number: int, report: Mapping[str, Any], skipped: bool) -> None:
        """Record a batch that was rolled back. skipped: the stream continues without it."""
        body = {"stream": self.streams[-1].number, "batch": number, "report": report, "stopped": not skipped}
        self.log.append("rejected", body)

    def record_outcome(self, n_edits: int, missed: Sequence[Mapping[str, Any]]) -> None:
        """Record what was seen after the last batch of a stream. Nothing is added when nothing was written since.

        missed: the edits that did not take, as plain data"""
        if self.log.records[-1].kind != "outcome":
            body = {"stream": self.streams[-1].number, "n_edits": n_edits, "missed": missed}
            self.log.append("outcome", body)

    def rewind(self, keep: int, then: Sequence[Record] = ()) -> None:
        """Take back all but the first `keep` live batches, and put the pending batches `then` in force."""
        self.log.append("rewind", {"keep": keep, "then": [record.number for record in then]})

    def snapshot_if_due(self, weights: EditableWeights, state: AnyState) -> None:
        """Write a snapshot when enough was written since the last one. A failure is a warning: nothing needs it."""
        changed = {layer: weights.changed(layer) for layer in weights.layers}
        carried = state.tensors()
        if self._bytes_since_snapshot() < SNAPSHOT_SHARE * _snapshot_size(weights, changed, carried):
            return

        tensors = {f"state/{name}": tensor for name, tensor in carried.items()}
        for layer, index in changed.items():
            tensors[f"weight/{layer}"] = weights.stored(layer, index)
            if index is not None:
                tensors[f"columns/{layer}"] = index

        live = self.live
        try:
            self.log.append("snapshot", {"live": len(live), "last": live[-1].number}, _storable(tensors))
        except (OSError, TypeError) as error:
            log.warning("no snapshot: %s", error)

    def _bytes_since_snapshot(self) -> int:
        """Bytes of the batches that were written since the last snapshot."""
        size = 0
        for record in reversed(self.log.records):
            if record.kind == "snapshot":
                break
            size += record.size if record.kind == "batch" else 0
        return size

    def replay_weights(self, weights: EditableWeights, upto: int | None = None) -> None:
        """Bring the original weights to what they were after the first `upto` live batches (None = all).

        Raises DamagedRun. Warns when the bits are not those that were written, as on another kind of machine."""
        live = self.live[:upto]
        weights.reset()

        snapshot = self._snapshot(live)
        if snapshot is not None:
            tensors = self.log.tensors(snapshot.number)
            for layer, columns in _part(tensors, "weight/").items():
                weights.put(int(layer), tensors.get(f"columns/{layer}"), columns)

        for record in _after(live, snapshot):
            replay(weights, _part(self.log.tensors(record.number), "written/"))

        self._compare_bits(weights, live)

    def _compare_bits(self, weights: EditableWeights, live: Sequence[Record]) -> None:
        """Warn when the weights are not bit for bit those that were written."""
        written = {int(layer): sha256 for record in live for layer, sha256 in record.body["weights"].items()}
        other = [layer for layer, sha256 in written.items() if weights.layer_hash(layer) != sha256]
        if other:
            log.warning(
                "%s: replayed, but layers %s are not bit for bit those that were written: another machine, library"
                " or number of threads rounds differently",
                self.log.folder,
                other,
            )

    def replay_state(self, state: AnyState, upto: int | None = None) -> None:
        """Bring a method's state to what it was after the first `upto` live batches (None = all)."""
        live = self.live[:upto]

        snapshot = self._snapshot(live)
        state.load({} if snapshot is None else _part(self.log.tensors(snapshot.number), "state/"))

        for record in _after(live, snapshot):
            state.take_in(_part(self.log.tensors(record.number), "kept/"))

    def edits(self, record: Record) -> EditSet:
        """The edits of a batch's record. Raises RunError naming the fields that this version does not know."""
        text = self.log.tensors(record.number)["edits"].numpy().tobytes()
        where = self.log.path(record.number)
        return EditSet(
            tuple(Edit(**completed(Edit, plain, f"edits[{row}]", where)) for row, plain in enumerate(json.loads(text)))
        )

    def values(self, record: Record) -> dict[str, Tensor]:
        """What the batch of a record can be solved again from: its `Result.tensors`."""
        return _part(self.log.tensors(record.number), "values/")

    def _snapshot(self, live: Sequence[Record]) -> Record | None:
        """The last snapshot whose batches are the first of these."""
        for record in reversed(self.log.records):
            n_live = record.body.get("live", 0) if record.kind == "snapshot" else 0
            if 0 < n_live <= len(live) and live[n_live - 1].number == record.body["last"] and self._is_sound(record):
                return record
        return None

    def _is_sound(self, record: Record) -> bool:
        """Whether the file of a record holds what was written."""
        try:
            self.log.tensors(record.number)
        except DamagedRun:
            return False
        return True


def describe_run(
    model: ModelAdapter,
    weights: EditableWeights,
    settings: Settings,
    prepared: Mapping[str, Any],
    moments: object = None,
) -> dict[str, Any]:
    """The body of a run's first record. prepared: the state's `describe()`; moments: as given to the editor."""
    text = moments.path if isinstance(moments, Source) else None
    return {
        "moments_text": None if text is None else str(text.resolve()),
        "settings": {**settings, "config": recorded(settings["config"])},
        "prepared": prepared,
        "model": identity(model, weights),
        "machine": machine(),
    }


def _snapshot_size(
    weights: EditableWeights, changed: Mapping[int, Tensor | None], carried: Mapping[str, Tensor]
) -> int:
    """Bytes of a snapshot. changed: layer -> its changed columns, None = all; carried: the state's tensors."""
    size = sum(tensor.nbytes for tensor in carried.values())
    for layer, index in changed.items():
        d_model, d_ff = weights.current(layer).shape
        n_columns = d_ff if index is None else len(index)
        size += d_model * n_columns * weights.working_dtype(layer).itemsize
    return size


def _ways_out(n_sound: int) -> str:
    """What remains of a run whose first `n_sound` batches in force are whole."""
    if n_sound < 0:
        return "; restore the file"
    batches, verb = counted(n_sound, "batch", "batches"), "is" if n_sound == 1 else "are"
    return (
        f"; the first {batches} in force {verb} sound: restore the file, or take the rest back"
        f" (fastedit undo --to {n_sound})"
    )


def _after(live: Sequence[Record], snapshot: Record | None) -> Sequence[Record]:
    """The live batches that a snapshot does not cover."""
    return live[snapshot.body["live"] if snapshot else 0 :]


def _flat(data: Any, place: str = "") -> dict[str, Any]:
    """{"config": {"rounds": 2}} as {"config.rounds": 2}."""
    if not isinstance(data, dict):
        return {place.removeprefix("."): data}
    return {name: value for key, part in data.items() for name, value in _flat(part, f"{place}.{key}").items()}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a record's file takes them: on the CPU, dense, and no two in one piece of memory.

    Raises TypeError naming what is no dense tensor."""
    storable: dict[str, Tensor] = {}
    used: set[int] = set()

    for name, tensor in tensors.items():
        given: object = tensor
        if not isinstance(given, Tensor) or given.layout != torch.strided:
            what = f"a tensor of layout {given.layout}" if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"{name}: a record holds dense tensors only, got {what}")

        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        storable[name] = plain.clone() if memory in used else plain
        used.add(memory)
    return storable


def _as_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode("ascii")), dtype=torch.uint8)
