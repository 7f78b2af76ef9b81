"""From edits to a store in stages: each is kept, a stopped run is continued, and new edits leave old neurons alone."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastedit.methods.meg import CONFIGS, BadStore, MeG, Store, stages
from fastedit.methods.meg.stages import split_others
from fastedit.records.edit import Edit, EditSet, InvalidEdits


@pytest.fixture
def folder(meg_folder: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(meg_folder, tmp_path / "run")
    return tmp_path / "run"


def refuse(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("this stage was done already")


def test_a_finished_run_does_nothing_again(
    make_meg: Callable[..., MeG],
    folder: Path,
    few_edits: EditSet,
    other_edits: EditSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = Store.load(folder / "meg.safetensors")
    for name in ("train_encoder", "fit_neurons", "train_familiarity", "train_epoch"):
        monkeypatch.setattr(stages, name, refuse)
    run = make_meg().edit(few_edits, other_edits, folder)
    after = Store.load(folder / "meg.safetensors")
    assert torch.equal(before.neurons, after.neurons)
    assert all(torch.equal(before.generator[name], after.generator[name]) for name in before.generator)
    assert run.seconds["neurons"] == pytest.approx(before.seconds["neurons"])


def test_new_edits_are_added_to_the_neurons(
    make_meg: Callable[..., MeG], folder: Path, tiny_facts: EditSet, few_edits: EditSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Store.load(folder / "meg.safetensors")
    counted: list[int] = []
    fit = stages.fit_neurons

    def counting(model: Any, sequences: Any, *rest: Any) -> Any:
        counted.append(len(sequences))
        return fit(model, sequences, *rest)

    monkeypatch.setattr(stages, "fit_neurons", counting)
    meg = make_meg("meg-lookup", **_lookup())
    meg.edit([*few_edits, *tiny_facts[200:203]], (), folder)
    assert counted == [3]
    assert torch.equal(meg.store.neurons[:12], before.neurons)
    assert torch.equal(meg.store.initial, before.initial)
    assert meg.store.facts[12][2] == tiny_facts[200].target_new


def _lookup() -> dict[str, Any]:
    return {"gate": CONFIGS["meg-lookup"].gate, "generator": CONFIGS["meg-lookup"].generator}


def test_fitting_goes_on_after_a_stop(
    make_meg: Callable[..., MeG], few_edits: EditSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "CHUNK", 4)
    whole = make_meg("meg-lookup", **_lookup())
    whole.edit(few_edits, (), tmp_path / "whole")
    fit, calls = stages.fit_neurons, []

    def stopping(*arguments: Any) -> Any:
        calls.append(len(arguments[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(stages, "fit_neurons", stopping)
    part = make_meg("meg-lookup", **_lookup())
    with pytest.raises(KeyboardInterrupt):
        part.edit(few_edits, (), tmp_path / "part")
    part.edit(few_edits, (), tmp_path / "part")
    assert calls == [4, 4, 4, 4]
    assert torch.equal(part.store.neurons, whole.store.neurons)


def test_training_the_generator_goes_on_after_a_stop(
    make_meg: Callable[..., MeG],
    folder: Path,
    few_edits: EditSet,
    other_edits: EditSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = Store.load(folder / "meg.safetensors")
    (folder / "generator-dit.safetensors").unlink()
    train, seen = stages.train_epoch, []

    def stopping(run: Any, *rest: Any) -> float:
        seen.append(run.epoch)
        if len(seen) == 18:
            raise KeyboardInterrupt
        return train(run, *rest)

    monkeypatch.setattr(stages, "train_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        make_meg().edit(few_edits, other_edits, folder)
    assert (folder / "generator-dit.part").is_file()
    make_meg().edit(few_edits, other_edits, folder)
    # Epochs 10 to 16 were done after the last save, and are done again.
    assert seen[18] == 10
    after = Store.load(folder / "meg.safetensors")
    assert all(torch.equal(before.generator[name], after.generator[name]) for name in before.generator)
    assert not (folder / "generator-dit.part").exists()


def test_a_stop_while_writing_leaves_the_last_state(
    make_meg: Callable[..., MeG],
    folder: Path,
    few_edits: EditSet,
    other_edits: EditSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "generator-dit.safetensors").unlink()
    write, states = Path.write_bytes, []

    def stopping(path: Path, data: bytes) -> int:
        states.append(torch.load(io.BytesIO(data[32:]), weights_only=True)["state"]["epoch"])
        if len(states) == 2:
            write(path, data[:1000])
            raise KeyboardInterrupt
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", stopping)
    monkeypatch.setattr(stages, "judge_every", lambda *arguments: False)
    with pytest.raises(KeyboardInterrupt):
        make_meg().edit(few_edits, other_edits, folder)
    monkeypatch.undo()
    assert states == [10, 20]
    assert stages._read_unfinished(folder / "generator-dit.part")["state"]["epoch"] == 10

    # A changed byte of it is told, and trains no other generator.
    path = folder / "generator-dit.part"
    data = path.read_bytes()
    for place in (5, len(data) // 2, len(data) - 5):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(BadStore, match=r"generator-dit\.part.*checksum differs"):
            make_meg().edit(few_edits, other_edits, folder)


def test_other_settings_make_a_stage_again(
    make_meg: Callable[..., MeG],
    folder: Path,
    few_edits: EditSet,
    other_edits: EditSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("train_encoder", "fit_neurons", "train_epoch"):
        monkeypatch.setattr(stages, name, refuse)
    meg = make_meg()
    gate = meg.config.gate.model_copy(update={"blocks": 1})
    make_meg(gate=gate).edit(few_edits, other_edits, folder)
    assert sum(".0.weight" in name for name in Store.load(folder / "meg.safetensors").gate) == 1


def test_nothing_is_chosen_on_the_edits(few_edits: EditSet, other_edits: EditSet) -> None:
    twin = few_edits[0].model_copy(update={"case_id": 900})
    rest, development = split_others([twin, *other_edits, *other_edits], few_edits)
    subjects = [e.subject for e in (*rest, *development)]
    assert len(subjects) == len(set(subjects))
    assert not {e.subject for e in few_edits} & set(subjects)
    assert len(development) == len(subjects) // 4


def test_a_tiny_development_slice_does_not_shut_the_gate(
    make_meg: Callable[..., MeG], folder: Path, few_edits: EditSet, other_edits: EditSet
) -> None:
    meg = make_meg()
    run = meg.edit(few_edits, other_edits, folder, development=other_edits[:2])
    assert run.threshold >= meg.config.gate.sure
    assert bool(meg.server.decide([e.prompt for e in few_edits]).active.all())


def test_look_up_serves_stored_neurons(
    make_meg: Callable[..., MeG], folder: Path, few_edits: EditSet, other_edits: EditSet
) -> None:
    meg = make_meg("meg-lookup", **_lookup())
    run = meg.edit(few_edits, other_edits, folder)
    assert run.threshold != pytest.approx(0.3)
    decision = meg.server.decide([e.prompt for e in few_edits])
    assert bool(decision.active.all())
    assert torch.equal(decision.flat, meg.store.neurons)
    _, after = meg.measure()
    assert after.reliability is not None
    assert after.reliability[0] >= 90
    assert not meg.store.gate
    assert not meg.store.generator


def test_without_a_gate_every_prompt_is_edited(
    make_meg: Callable[..., MeG], folder: Path, few_edits: EditSet, other_edits: EditSet
) -> None:
    none = _lookup()["gate"].model_copy(update={"kind": "none"})
    meg = make_meg("meg-lookup", gate=none, generator=_lookup()["generator"])
    meg.edit(few_edits, other_edits, folder)
    assert bool(meg.server.decide(["Nothing that was ever asked"]).active.all())


def test_failed_fits_are_named_and_unknown_to_the_gate(
    make_meg: Callable[..., MeG], few_edits: EditSet, other_edits: EditSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = stages.fit_neurons

    def failing(*arguments: Any) -> Any:
        fitted = fit(*arguments)
        fitted.solved[3] = False
        return fitted

    monkeypatch.setattr(stages, "fit_neurons", failing)
    learned: list[int] = []
    train = stages.train_familiarity

    def counting(vectors: torch.Tensor, *rest: Any) -> Any:
        learned.append(len(vectors))
        return train(vectors, *rest)

    monkeypatch.setattr(stages, "train_familiarity", counting)
    meg = make_meg()
    quick = meg.config.generator.model_copy(update={"epochs": 1})
    meg = make_meg(generator=quick)
    run = meg.edit(few_edits, other_edits)
    assert run.failed == (few_edits[3].case_id,)
    assert learned[0] == 11


def test_wrong_edits_are_refused_before_anything_runs(
    make_meg: Callable[..., MeG], few_edits: EditSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "fit_neurons", refuse)
    clash = few_edits[0].model_copy(update={"target_new": "something else", "case_id": "b"})
    with pytest.raises(InvalidEdits, match="contradicts"):
        make_meg().edit([*few_edits, clash])
    with pytest.raises(InvalidEdits, match="no edits"):
        make_meg().edit([])
    assert isinstance(few_edits[0], Edit)
