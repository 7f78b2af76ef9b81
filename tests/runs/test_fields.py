"""Fields that a run or this version does not know: at its old value a field changes nothing, else it is named."""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, get_args

import pytest
import torch
from pydantic import BaseModel, BeforeValidator, Field, create_model

import fastedit.methods.presets  # noqa: F401  (imports every settings class)
from fastedit.config import Config, EditConfig
from fastedit.editor import Editor
from fastedit.methods.closed_form.config import NSEConfig, ValueConfig
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import Edit, EditSet, Probe
from fastedit.runs.fields import completed, declares_before, fields, recorded
from fastedit.runs.log import RunError, RunLog
from fastedit.runs.recorder import Recorder
from fastedit.runs.streams import edit_hash, stream_hash

Make = Callable[[EditConfig], Editor]

OLDER = Path(__file__).resolve().parent / "written_by_0.1.0"

# The fields that a class brought along: runs of the class have always held them. Add a new class here with its fields.
# A field that is added to a class later does not go here: it declares the value that it has in older runs, see
# fastedit.runs.fields. A field that is removed stays here, and in `removed` of its class.
FIRST_FIELDS = {
    # Of 0.1.0.
    "MomentConfig": "tokens window token_budget",
    "ValueConfig": "steps lr weight_decay kl_factor clamp stop_loss stop_after_top1 token_budget dtype",
    "TemplateConfig": "seeds length top_k",
    "ClosedFormConfig": "layers value templates moments rewind_values",
    "NSEConfig": "covariance_weight mass rounds residual_min residual_max rewind_values as_released",
    "MEMITConfig": "covariance_weight memory",
    "AlphaEditConfig": "null_threshold ridge",
    "TrainConfig": "steps lr stop_probability reduce kl_factor repetition_factor norm_factor token_budget",
    "ColumnConfig": "frozen_layers",
    "FiNEConfig": "neurons frozen_layers score_activation token common_share background protect train",
    "AttributionConfig": "nodes path tokens everywhere answer",
    "KNEConfig": "share key_layers alpha alpha_per ensemble fixed frozen_layers attribution train",
    "KNConfig": "threshold frozen_layers attribution",
    "Edit": ("case_id subject prompt target_new target_true rephrase_prompts generation_prompts locality portability"),
    "Probe": "prompt answers group",
    # Of an edit that is checked, never of one that is recorded.
    "LocatedEdit": "subject",
}


class LaterValue(ValueConfig):
    """A part of the settings with a new field."""

    momentum: float = Field(0.9, json_schema_extra={"before": 0})


class Extra(Config):
    """A new part of the settings."""

    strength: float = 2.0


class LaterNSE(NSEConfig):
    """Settings with new fields whose defaults are not what older runs did."""

    value: LaterValue = LaterValue()
    clip: float | None = Field(1.0, json_schema_extra={"before": None})
    extra: Extra | None = Field(Extra(), json_schema_extra={"before": None})


class LaterProbe(NamedTuple):
    """`Probe` with new fields."""

    prompt: str
    answers: tuple[str, ...] = ()
    group: str | None = None
    aliases: Annotated[tuple[str, ...], Field(json_schema_extra={"before": ()})] = ()
    weight: Annotated[float, Field(json_schema_extra={"before": 1})] = 1.0


class LaterEdit(Edit):
    """`Edit` with a new field."""

    language: str = Field("de", json_schema_extra={"before": "en"})


def later_probes(rows: Iterable[Any]) -> tuple[LaterProbe, ...]:
    """Of lists, as JSON holds them."""
    return tuple(LaterProbe(*(tuple(part) if isinstance(part, list) else part for part in row)) for row in rows)


class EditWithLaterProbes(Edit):
    """`Edit` with a new kind of probe."""

    locality: Annotated[tuple[LaterProbe, ...], BeforeValidator(later_probes)] = ()


@pytest.fixture
def editor_with(tiny_model: ModelAdapter, older_moments: dict[int, torch.Tensor]) -> Make:
    """Makes NSE editors with these settings, on unedited models and with the second moments of older runs."""

    def make(config: EditConfig) -> Editor:
        return Editor(copy.deepcopy(tiny_model), "nse", config, moments=older_moments, progress=False)

    return make


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """An NSE run of 0.1.0 that was stopped after two batches of five."""
    return shutil.copytree(OLDER / "nse-stopped", tmp_path / "nse-stopped")


def parts(hint: Any) -> Iterator[type[Any]]:
    """The models and NamedTuples in a type."""
    if isinstance(hint, type) and (issubclass(hint, BaseModel) or hasattr(hint, "_fields")):
        yield hint
    for inner in get_args(hint):
        yield from parts(inner)


def recorded_classes(kind: type[Any]) -> Iterator[type[Any]]:
    """A class, those it is made of, and its subclasses in fastedit."""
    yield kind
    for field in fields(kind).values():
        for part in parts(field.annotation):
            yield from recorded_classes(part)
    for subclass in kind.__subclasses__():
        if subclass.__module__.startswith("fastedit."):
            yield from recorded_classes(subclass)


def undecided(kind: type[Any], first: Mapping[str, str] = FIRST_FIELDS) -> list[str]:
    """Fields that were added to the class or removed from it without a word on older runs."""
    known = first.get(kind.__name__, "").split()
    own = [name for name in fields(kind) if name in inspect.get_annotations(kind)]

    added = [name for name in own if name not in known and not declares_before(fields(kind)[name])]
    removed = [name for name in known if name not in fields(kind) and name not in getattr(kind, "removed", {})]
    return [f"{kind.__name__}.{name}" for name in added + removed]


def test_every_field_has_a_value_for_older_runs() -> None:
    classes = {*recorded_classes(EditConfig), *recorded_classes(Edit)}
    assert {kind.__name__ for kind in classes} >= FIRST_FIELDS.keys()
    assert [name for kind in classes for name in undecided(kind)] == []


def test_a_field_without_a_value_for_older_runs_is_found() -> None:
    class Careless(ValueConfig):
        momentum: float = 0.9

    class Redeclared(LaterValue):
        momentum: float = 0.5

    class CarelessProbe(NamedTuple):
        prompt: str
        aliases: tuple[str, ...] = ()

    first = {"CarelessProbe": "prompt group"}
    assert undecided(LaterValue) == []
    assert undecided(Careless) == ["Careless.momentum"]
    assert undecided(Redeclared) == ["Redeclared.momentum"]
    assert undecided(CarelessProbe, first) == ["CarelessProbe.aliases", "CarelessProbe.group"]
    assert undecided(KeptRemoved, {"KeptRemoved": "clip layers"}) == []


class KeptRemoved(EditConfig):
    """Settings that had a field `clip`."""

    removed: ClassVar[Mapping[str, Any]] = {"clip": None}

    layers: tuple[int, ...] = ()


class TestSettings:
    def test_an_older_run_counts_at_the_old_values(self, stopped: Path) -> None:
        recorder = Recorder.open(stopped)
        config = recorder.config(LaterNSE)
        assert (config.clip, config.value.momentum, config.extra) == (None, 0, None)
        assert NSEConfig.model_validate(recorded(config)) == recorder.config(NSEConfig)

    def test_an_older_run_is_resumed_to_its_end(
        self, stopped: Path, editor_with: Make, tiny_facts: EditSet, tmp_path: Path
    ) -> None:
        other = shutil.copytree(stopped, tmp_path / "other")
        plain, later = (
            editor_with(Recorder.open(folder).config(kind))
            for folder, kind in ((stopped, NSEConfig), (other, LaterNSE))
        )
        plain.edit(tiny_facts[:10], 2, run_dir=stopped, resume=True)
        later.edit(tiny_facts[:10], 2, run_dir=other, resume=True)
        assert later.weights.fingerprint() == plain.weights.fingerprint()

    def test_a_real_difference_is_named(self, stopped: Path, editor_with: Make, tiny_facts: EditSet) -> None:
        config = Recorder.open(stopped).config(LaterNSE)
        clipped = config.model_copy(update={"clip": 1.0})
        faster = config.model_copy(update={"value": config.value.model_copy(update={"momentum": 0.9})})
        stronger = config.model_copy(update={"extra": Extra()})
        for other, named in (
            (clipped, r"config\.clip is 1\.0, was None"),
            (faster, r"config\.value\.momentum is 0\.9, was 0"),
            (stronger, r"config\.extra\.strength is 2\.0"),
        ):
            with pytest.raises(RunError, match=named):
                editor_with(other).edit(tiny_facts[:10], 2, run_dir=stopped, resume=True)

    def test_a_later_run_is_read_where_its_new_fields_have_their_old_values(
        self, stopped: Path, editor_with: Make, tiny_facts: EditSet, tmp_path: Path
    ) -> None:
        config = Recorder.open(stopped).config(LaterNSE)
        editor_with(config).edit(tiny_facts[:2], run_dir=tmp_path / "same")
        header = Recorder.open(tmp_path / "same").header
        assert header["settings"] == Recorder.open(stopped).header["settings"]

        clipped = config.model_copy(update={"clip": 0.5, "extra": Extra(strength=3)})
        editor_with(clipped).edit(tiny_facts[:2], run_dir=tmp_path / "clipped")
        recorder = Recorder.open(tmp_path / "clipped")
        assert recorder.config(LaterNSE) == clipped
        with pytest.raises(RunError, match=r"config\.clip = 0\.5, config\.extra = .*not known to this version"):
            recorder.config(NSEConfig)
        with pytest.raises(RunError, match=r"config\.clip = 0\.5"):
            editor_with(Recorder.open(stopped).config(NSEConfig)).edit(
                tiny_facts[:2], run_dir=tmp_path / "clipped", resume=True
            )

    @pytest.mark.parametrize(
        "removed", [{"mass": 1, "as_released": False}, {"mass": 1}, {"mass": 1, "as_released": True}]
    )
    def test_a_removed_field_is_read_at_its_old_value_only(self, removed: dict[str, Any], stopped: Path) -> None:
        kept = {
            name: (field.annotation, field)
            for name, field in NSEConfig.model_fields.items()
            if name not in ("mass", "as_released")
        }
        fewer = create_model("FewerNSE", __base__=EditConfig, **kept)
        fewer.removed = removed
        if removed.get("as_released") is False:
            assert Recorder.open(stopped).config(fewer).rounds == 2
        else:
            with pytest.raises(RunError, match=r"nse-stopped: config\.as_released = False: not known"):
                Recorder.open(stopped).config(fewer)

    def test_a_value_that_is_refused_now_is_named(self, stopped: Path) -> None:
        class Stricter(NSEConfig):
            rounds: int = Field(3, ge=3)

        with pytest.raises(RunError, match=r"(?s)nse-stopped: .*refuses.*rounds"):
            Recorder.open(stopped).config(Stricter)

    def test_a_part_at_its_old_value_may_be_a_mapping(self) -> None:
        class Later(EditConfig):
            extra: Extra = Field(Extra(), json_schema_extra={"before": {"strength": 0}})

        assert completed(Later, {}, "config", "here") == {"extra": {"strength": 0}}
        assert recorded(Later(extra=Extra(strength=0))) == {}
        assert recorded(Later()) == {"extra": {"strength": 2.0}}


class TestEdits:
    @pytest.mark.parametrize("name", ["nse", "fine"])
    def test_hashes_are_those_of_older_runs(self, name: str, tiny_facts: EditSet) -> None:
        recorder = Recorder(RunLog(OLDER / name))
        for record in recorder.live:
            hashes = [edit["sha256"] for edit in record.body["edits"]]
            assert [edit_hash(edit) for edit in recorder.edits(record)] == hashes
            assert [edit_hash(LaterEdit(**dict(edit), language="en")) for edit in recorder.edits(record)] == hashes

        batches = [tiny_facts[start : start + 2] for start in (0, 2, 4)]
        assert recorder.streams[0].body["edits_sha256"] == stream_hash(batches)

    def test_an_older_run_is_resumed_with_a_new_field(
        self,
        stopped: Path,
        editor_with: Make,
        tiny_facts: EditSet,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for module in ("runs.recorder", "records.check"):
            monkeypatch.setattr(f"fastedit.{module}.Edit", LaterEdit)
        config = Recorder.open(stopped).config(NSEConfig)
        edits = [LaterEdit(**dict(edit), language="en") for edit in tiny_facts[:10]]
        german = [*edits[:9], LaterEdit(**dict(tiny_facts[9]))]
        with pytest.raises(RunError, match="these edits are others than then, from edit 5 on or later"):
            editor_with(config).edit(german, 2, run_dir=stopped, resume=True)

        editor = editor_with(config)
        run = editor.edit(edits, 2, run_dir=stopped, resume=True)
        assert len(run.edits) == 10
        assert [edit.language for edit in editor.edits] == ["en"] * 10

    def test_a_field_of_a_later_version_is_named(
        self, editor_with: Make, tiny_facts: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        edits = [LaterEdit(**dict(tiny_facts[0]), language="en"), LaterEdit(**dict(tiny_facts[1]))]
        editor = editor_with(Recorder(RunLog(OLDER / "nse")).config(NSEConfig))
        with monkeypatch.context() as later:
            later.setattr("fastedit.records.check.Edit", LaterEdit)
            editor.edit(edits, run_dir=tmp_path / "run")

        recorder = Recorder.open(tmp_path / "run")
        with pytest.raises(RunError, match=r"000002\.safetensors: edits\[1\]\.language = 'de': not known"):
            recorder.edits(recorder.live[0])

    def test_new_fields_of_probes_stand_at_the_end_of_their_lists(self) -> None:
        probes = [("p", ("a",), "g"), ("q", ("b",), "g", ("c",))]
        fields_of_edit = {"prompt": "The {} is", "subject": "sky", "target_new": "red"}
        plain = Edit(**fields_of_edit, locality=probes[:1])
        later = EditWithLaterProbes(**fields_of_edit, locality=(LaterProbe(*probes[0]),))
        assert edit_hash(later) == edit_hash(plain)

        whole = completed(EditWithLaterProbes, recorded(plain), "edit", "here")
        assert whole["locality"] == [["p", ["a"], "g", [], 1]]
        assert EditWithLaterProbes(**whole) == later

        both = EditWithLaterProbes(**fields_of_edit, locality=tuple(LaterProbe(*probe) for probe in probes))
        assert recorded(both)["locality"] == [["p", ["a"], "g"], ["q", ["b"], "g", ["c"]]]
        with pytest.raises(RunError, match=r"here: edit\.locality\[1\]\.3 = \['c'\]: not known"):
            completed(Edit, recorded(both), "edit", "here")

    def test_records_without_new_fields_are_recorded_as_they_are(self, tiny_facts: EditSet) -> None:
        for edit in tiny_facts:
            assert recorded(edit) == edit.model_dump(mode="json", exclude={"subject_at", "join"})
            assert Edit(**completed(Edit, recorded(edit), "edit", "here")) == edit
        assert any(isinstance(probe, Probe) for edit in tiny_facts for probe in edit.locality)
