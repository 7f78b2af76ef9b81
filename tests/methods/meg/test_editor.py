"""The public object: calls of `edit` add up, a loaded store takes further edits, and what it lacks is refused."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastedit.methods.columns.config import FiNEConfig
from fastedit.methods.meg import CONFIGS, MeG, MegRun, Store, stages
from fastedit.methods.meg.metrics import same_answer
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import EditSet, InvalidEdits

from .conftest import SMALL


class Grown(NamedTuple):
    """A session of two calls of six edits. first, second: the stores after each; folder: of the stages"""

    meg: MeG
    runs: tuple[MegRun, MegRun]
    first: Store
    second: Store
    folder: Path


@pytest.fixture(scope="module")
def grown(
    tiny_parts: tuple[Any, Any], few_edits: EditSet, other_edits: EditSet, tmp_path_factory: pytest.TempPathFactory
) -> Grown:
    """To be looked at, not edited."""
    folder = tmp_path_factory.mktemp("grown")
    model, tokenizer = tiny_parts
    meg = MeG(ModelAdapter(copy.deepcopy(model), tokenizer), config=SMALL, progress=False)
    one = meg.edit(few_edits[:6], other_edits, folder / "run")
    shutil.copytree(folder / "run", folder / "after-first")
    first = meg.store
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "train_encoder", refuse)
        two = meg.edit(few_edits[6:], work_dir=folder / "run")
    return Grown(meg, (one, two), first, meg.store, folder)


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many neurons each fit had to do."""
    counts: list[int] = []
    fit = stages.fit_neurons

    def counting(*arguments: Any) -> Any:
        counts.append(len(arguments[1]))
        return fit(*arguments)

    monkeypatch.setattr(stages, "fit_neurons", counting)
    return counts


def refuse(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("there was nothing to do here")


def lookup() -> dict[str, Any]:
    return {"gate": CONFIGS["meg-lookup"].gate, "generator": CONFIGS["meg-lookup"].generator}


def n_right(meg: MeG, edits: EditSet) -> int:
    answers = meg.ask([e.prompt for e in edits])
    return sum(same_answer(answer, e.target_new, True) for answer, e in zip(answers, edits, strict=True))


def test_two_calls_answer_what_one_call_answers(
    grown: Grown, meg: MeG, few_edits: EditSet, other_edits: EditSet
) -> None:
    assert list(grown.meg.edits) == list(few_edits)
    assert bool(grown.meg.server.decide([e.prompt for e in few_edits]).active.all())
    assert n_right(grown.meg, few_edits) >= max(11, n_right(meg, few_edits) - 1)
    _, apart = grown.meg.measure()
    _, together = meg.measure(few_edits)
    assert apart.reliability is not None
    assert together.reliability is not None
    assert apart.reliability[1] >= together.reliability[1] - 10
    others = [e.prompt for e in other_edits[80:108]]
    assert grown.meg.server.decide(others).active.float().mean() < 0.5


def test_what_was_learned_stays_bit_for_bit(grown: Grown) -> None:
    assert torch.equal(grown.second.neurons[:6], grown.first.neurons)
    assert torch.equal(grown.second.vectors[:6], grown.first.vectors)
    assert torch.equal(grown.second.initial, grown.first.initial)
    assert grown.second.encoder.keys() == grown.first.encoder.keys()
    assert all(torch.equal(grown.second.encoder[name], grown.first.encoder[name]) for name in grown.first.encoder)
    assert not torch.equal(grown.second.gate["out.weight"], grown.first.gate["out.weight"])


def test_a_run_reports_its_own_edits(grown: Grown, few_edits: EditSet) -> None:
    one, two = grown.runs
    assert (list(one.edits), one.n_in_force) == (list(few_edits[:6]), 6)
    assert (list(two.edits), two.n_in_force) == (list(few_edits[6:]), 12)
    failed = {edit.case_id for edit, ok in zip(few_edits, grown.second.solved.tolist(), strict=True) if not ok}
    assert {*one.failed, *two.failed} == failed
    assert two.to_dict()["n_edits"] == 6
    assert two.to_dict()["n_in_force"] == 12


def test_an_interrupted_call_leaves_the_earlier_edits_and_is_continued(
    grown: Grown,
    make_meg: Callable[..., MeG],
    few_edits: EditSet,
    other_edits: EditSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fitted: list[int],
) -> None:
    shutil.copytree(grown.folder / "after-first", tmp_path / "run")
    train, epochs = stages.train_epoch, []

    def stopping(run: Any, *rest: Any) -> float:
        epochs.append(run.epoch)
        if len(epochs) == 18:
            raise KeyboardInterrupt
        return train(run, *rest)

    monkeypatch.setattr(stages, "train_epoch", stopping)
    meg = make_meg()
    meg.load(tmp_path / "run" / "meg.safetensors")
    with pytest.raises(KeyboardInterrupt):
        meg.edit(few_edits[6:], other_edits, tmp_path / "run")
    assert list(meg.edits) == list(few_edits[:6])
    assert n_right(meg, few_edits[:6]) >= 5

    again = make_meg()
    again.load(tmp_path / "run" / "meg.safetensors")
    again.edit(few_edits[6:], other_edits, tmp_path / "run")
    assert fitted == [6]
    assert epochs[18] == 10
    assert torch.equal(again.store.neurons, grown.second.neurons)
    assert all(torch.equal(again.store.generator[n], value) for n, value in grown.second.generator.items())


def test_the_later_edit_of_a_prompt_wins(make_meg: Callable[..., MeG], few_edits: EditSet, fitted: list[int]) -> None:
    meg = make_meg("meg-lookup", **lookup())
    meg.edit(few_edits[:6])
    later = few_edits[2].model_copy(update={"target_new": few_edits[9].target_new, "case_id": "later"})
    run = meg.edit([later, few_edits[7]])
    assert fitted == [6, 2]
    assert run.n_in_force == 7
    wanted = [*few_edits[:2], *few_edits[3:6], later, few_edits[7]]
    assert list(meg.edits) == wanted
    assert [fact[0] for fact in meg.store.facts] == [edit.case_id for edit in wanted]
    assert n_right(meg, EditSet(tuple(wanted))) == 7
    # The same edits once more: nothing is fitted, and nothing is in force twice.
    meg.edit(few_edits[:2])
    assert fitted == [6, 2]
    assert len(meg.edits) == len(meg.store) == 7


def test_a_loaded_store_of_look_up_takes_edits_without_other_records(
    make_meg: Callable[..., MeG],
    few_edits: EditSet,
    other_edits: EditSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fitted: list[int],
) -> None:
    first = make_meg("meg-lookup", **lookup())
    first.edit(few_edits[:6], other_edits)
    first.save(tmp_path / "six.safetensors")
    monkeypatch.setattr(stages, "train_encoder", refuse)

    meg = make_meg()
    meg.load(tmp_path / "six.safetensors")
    assert meg.method == "meg-lookup"
    meg.edit(few_edits[6:9])
    assert fitted == [6, 3]
    assert meg.store.threshold == first.store.threshold
    assert meg.store.n_others == first.store.n_others > 0
    assert torch.equal(meg.store.neurons[:6], first.store.neurons)
    assert torch.equal(meg.store.vectors[:6], first.store.vectors)
    assert n_right(meg, few_edits[:9]) == 9

    # What was added is in the next file, and a third call adds to that.
    meg.save(tmp_path / "nine.safetensors")
    again = make_meg()
    again.load(tmp_path / "nine.safetensors")
    again.edit(few_edits[9:])
    assert fitted == [6, 3, 3]
    assert list(again.edits) == list(few_edits)
    assert n_right(again, few_edits) == 12


def test_a_loaded_store_of_meg_needs_its_other_records_again(
    grown: Grown,
    make_meg: Callable[..., MeG],
    few_edits: EditSet,
    other_edits: EditSet,
    monkeypatch: pytest.MonkeyPatch,
    fitted: list[int],
) -> None:
    meg = make_meg()
    meg.load(grown.folder / "after-first" / "meg.safetensors")
    for name in ("fit_neurons", "train_encoder", "train_familiarity", "train_epoch", "make_encoder"):
        monkeypatch.setattr(stages, name, refuse)
    with pytest.raises(ValueError, match="trained with 108 other records, which it does not hold; give them again"):
        meg.edit(few_edits[6:])
    monkeypatch.undo()

    monkeypatch.setattr(stages, "train_encoder", refuse)
    meg.edit(few_edits[6:], other_edits)
    assert torch.equal(meg.store.neurons, grown.second.neurons)
    assert all(torch.equal(meg.store.gate[name], value) for name, value in grown.second.gate.items())


def test_records_that_become_edits_are_unlearned(
    grown: Grown, make_meg: Callable[..., MeG], other_edits: EditSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the encoder learned from must not be measured on: it is trained again without the new edit's subject."""
    learned: list[set[str]] = []
    train = stages.train_encoder

    def watching(encoder: Any, pairs: Any, *rest: Any) -> Any:
        learned.append({pair.original for pair in pairs})
        return train(encoder, pairs, *rest)

    monkeypatch.setattr(stages, "train_encoder", watching)
    meg = make_meg()
    meg.load(grown.folder / "after-first" / "meg.safetensors")
    meg.config = meg.config.model_copy(update=lookup())
    meg.edit(other_edits[:1], other_edits)
    assert len(learned) == 1
    assert other_edits[0].prompt not in learned[0]


def test_a_store_without_records_serves_and_takes_no_edits(
    grown: Grown, make_meg: Callable[..., MeG], few_edits: EditSet, other_edits: EditSet, tmp_path: Path
) -> None:
    dataclasses.replace(grown.second, records=None).save(tmp_path / "old.safetensors")
    meg = make_meg()
    meg.load(tmp_path / "old.safetensors")
    assert n_right(meg, few_edits) == n_right(grown.meg, few_edits)
    assert "12 edits in force" in repr(meg)
    with pytest.raises(ValueError, match="saved it without its records"):
        meg.edit(few_edits[:1], other_edits)
    with pytest.raises(ValueError, match="pass the edits to measure"):
        meg.measure()
    with pytest.raises(ValueError, match="kept no records in it"):
        _ = meg.edits


def test_a_loaded_store_brings_method_settings_seed_and_edits(
    grown: Grown, make_meg: Callable[..., MeG], few_edits: EditSet, tmp_path: Path
) -> None:
    dataclasses.replace(grown.second, seed=7).save(tmp_path / "seven.safetensors")
    meg = make_meg("meg-lookup", **lookup())
    meg.load(tmp_path / "seven.safetensors")
    assert (meg.method, meg.seed, meg.config) == ("meg", 7, SMALL)
    assert list(meg.edits) == list(few_edits)


def test_the_parts_have_the_names_of_the_editor(tiny_parts: tuple[Any, Any]) -> None:
    model, tokenizer = tiny_parts
    meg = MeG.from_model(model, tokenizer, "meg-lookup", {"fit": {"steps": 7}}, seed=3, progress=False)
    assert meg.model is model
    assert meg.tokenizer is tokenizer
    assert isinstance(meg.adapter, ModelAdapter)
    assert meg.adapter.model is model
    assert meg.config == CONFIGS["meg-lookup"].model_copy(
        update={"fit": CONFIGS["meg-lookup"].fit.model_copy(update={"steps": 7})}
    )
    assert meg.seed == 3
    assert len(meg.edits) == 0
    assert repr(meg) == "MeG(method='meg-lookup', model='LlamaForCausalLM', 0 edits in force)"


def test_objects_say_what_they_hold_on_one_line(grown: Grown) -> None:
    assert repr(grown.meg) == "MeG(method='meg', model='LlamaForCausalLM', 12 edits in force)"
    failed = len(grown.runs[1].failed)
    assert repr(grown.runs[1]) == (
        f"MegRun(method='meg', model='LlamaForCausalLM', 6 edits added, {failed} failed, 12 edits in force)"
    )


def test_wrong_settings_are_refused(make_meg: Callable[..., MeG], tiny_model: ModelAdapter) -> None:
    with pytest.raises(ValueError, match="meg, meg-lookup, got 'nse'"):
        make_meg("nse")
    with pytest.raises(TypeError, match="meg needs a MegConfig, got FiNEConfig"):
        MeG(tiny_model, "meg", FiNEConfig())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fit\.size"):
        MeG(tiny_model, "meg", {"fit": {"size": 3}})


def test_subjects_are_not_asked_for(tiny_parts: tuple[Any, Any], few_edits: EditSet, other_edits: EditSet) -> None:
    model, tokenizer = tiny_parts
    meg = MeG(ModelAdapter(copy.deepcopy(model), tokenizer), "meg-lookup", progress=False)
    edits = [edit.model_copy(update={"subject": None}) for edit in few_edits[:2]]
    run = meg.edit(edits)
    assert [edit.subject for edit in run.edits] == [None, None]
    assert all(
        same_answer(said, edit.target_new, True)
        for said, edit in zip(meg.ask([e.prompt for e in edits]), edits, strict=True)
    )


def test_what_stands_before_an_answer_is_the_template_and_no_record_changes_it(
    tiny_parts: tuple[Any, Any], few_edits: EditSet
) -> None:
    model, tokenizer = tiny_parts
    meg = MeG(ModelAdapter(copy.deepcopy(model), tokenizer), "meg-lookup", progress=False)
    with pytest.raises(InvalidEdits, match=r"edits\[1\]: case 1, field 'join': must be left out for MeG"):
        meg.edit([few_edits[0], few_edits[1].model_copy(update={"case_id": 1, "join": ""})])
