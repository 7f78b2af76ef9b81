"""The editor end to end on a model that knows facts: edits take, neighbours stay, trouble changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import processors

import fastedit.methods.closed_form.recipe as base
from fastedit.config import changed
from fastedit.editor import Editor
from fastedit.evaluation.metrics import evaluate
from fastedit.methods.closed_form.solver import RidgeSolver
from fastedit.methods.closed_form.values import Values
from fastedit.model.adapter import ModelAdapter
from fastedit.model.load import load_transformers
from fastedit.model.sampling import sample_background
from fastedit.records.edit import Edit, EditSet, InvalidEdits
from fastedit.runs.reports import BatchRejected


def parameters(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}


def same(editor: Editor, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in editor.model.state_dict().items())


def test_edits_take_and_neighbours_stay(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor()
    run = editor.edit(tiny_facts[:20], batch_size=10)
    found = evaluate(editor, run.edits, fluency_prompts=0)
    assert len(run.edits) == 20
    assert len(run.batches) == 2
    assert found.unedited["efficacy_top1"].value <= 0.05
    assert found.edited["efficacy_top1"].value >= 0.9
    assert found.edited["generalization_top1"].value >= 0.8
    assert found.edited["tokens_unchanged"].value >= 0.75
    assert editor.ask([tiny_facts[0].prompt], n_tokens=6)[0].strip().startswith(tiny_facts[0].target_new)


def test_settings_changed_after_the_editor_was_made_are_used(tiny_editor: Callable[..., Editor]) -> None:
    found = []
    for seeds in (["The"], ["The", "But"]):
        editor = tiny_editor()
        editor.config = changed(editor.config, {"templates": {"seeds": seeds}})
        found.append(len(editor.state.templates))
    assert found == [2, 3]


def test_undo_is_bit_exact_and_editing_again_gives_the_same_weights(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet
) -> None:
    editor = tiny_editor(mass=0.9)
    prints = [editor.weights.fingerprint()]
    # The third batch turns the past keys from rows into their dense sum.
    batches = [tiny_facts[:40], tiny_facts[40:80], tiny_facts[80:130]]
    fast = {"value": editor.config.value.model_copy(update={"steps": 3})}
    editor.config = editor.config.model_copy(update=fast)
    for batch in batches:
        editor.edit(batch)
        prints.append(editor.weights.fingerprint())
    assert len(set(prints)) == 4
    editor.undo()
    assert editor.weights.fingerprint() == prints[2]
    editor.edit(batches[2])
    assert editor.weights.fingerprint() == prints[3]
    editor.undo(last=3)
    assert editor.weights.fingerprint() == prints[0]
    assert len(editor.edits) == 0
    assert all(past.n_edits == 0 for past in editor.state.past.values())
    with pytest.raises(ValueError, match="0 batches are in memory"):
        editor.undo()


def test_two_editors_share_nothing(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    first, second = tiny_editor(), tiny_editor()
    untouched = parameters(second)
    first.edit(tiny_facts[:3])
    assert same(second, untouched)
    assert all(past.n_edits == 0 for past in second.state.past.values())


class TestTrouble:
    """A batch that cannot be written leaves every parameter as it was, and says which edit is to blame."""

    @pytest.fixture
    def broken_value(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The value of the edit about "bad" comes out as NaN."""
        real = base.optimise_values

        def with_nan(model: ModelAdapter, edits: EditSet, *rest: Any) -> Values:
            found = real(model, edits, *rest)
            for row, edit in enumerate(edits):
                if edit.case_id == 13:
                    found.z[row, 7] = float("nan")
            return found

        monkeypatch.setattr(base, "optimise_values", with_nan)

    @pytest.mark.usefixtures("broken_value")
    def test_nan_rolls_the_batch_back_and_names_the_edit(
        self, tiny_editor: Callable[..., Editor], tiny_facts: EditSet
    ) -> None:
        editor = tiny_editor()
        editor.edit(tiny_facts[:5])
        before = parameters(editor)
        with pytest.raises(BatchRejected, match=r"rolled back.*not finite.*case ids 13\b") as caught:
            editor.edit(tiny_facts[10:16])
        assert caught.value.case_ids == [13]
        assert same(editor, before)
        assert len(editor.edits) == 5
        assert all(past.n_edits == 5 for past in editor.state.past.values())

    @pytest.mark.usefixtures("broken_value")
    def test_skip_goes_on_with_the_next_batch(self, tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
        editor = tiny_editor()
        run = editor.edit(tiny_facts[8:20], batch_size=4, on_error="skip")
        assert [report.error is None for report in run.batches] == [True, False, True]
        assert run.batches[1].case_ids == (13,)
        alone = tiny_editor()
        alone.edit(tiny_facts[8:12])
        alone.edit(tiny_facts[16:20])
        assert editor.weights.fingerprint() == alone.weights.fingerprint()

    def test_fault_after_some_layers_were_written_restores_them(
        self, tiny_editor: Callable[..., Editor], tiny_facts: EditSet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        editor = tiny_editor()
        before, real, calls = parameters(editor), RidgeSolver.solve, []

        def fails_later(self: RidgeSolver, *arguments: Any) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(self, *arguments)

        monkeypatch.setattr(RidgeSolver, "solve", fails_later)
        with pytest.raises(KeyboardInterrupt):
            editor.edit(tiny_facts[:4])
        assert len(calls) == 3
        assert same(editor, before)

    def test_broken_second_moment_is_refused(self, tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
        editor = tiny_editor()
        editor.state.solvers[3] = RidgeSolver(-torch.eye(editor.adapter.d_ff), 1e6)
        before = parameters(editor)
        with pytest.raises(BatchRejected, match="not positive definite"):
            editor.edit(tiny_facts[:3])
        assert same(editor, before)


GOOD = {"prompt": "The flag of Zorun is", "subject": "Zorun", "target_new": "red", "case_id": 1}


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([], "no edits"),
        ([GOOD, {**GOOD, "case_id": 2, "target_new": "blue"}], "target_new"),
        ([GOOD, {**GOOD, "prompt": "The song of Zorun is"}], "case"),
        ([{**GOOD, "prompt": "The flag of Zorun is " + "very " * 300}], "prompt"),
    ],
    ids=["none", "two targets for one prompt", "duplicate case id", "longer than the model's positions"],
)
def test_bad_edits_touch_no_weight(edits: list[dict[str, Any]], message: str, tiny_editor: Any) -> None:
    editor = tiny_editor()
    before = parameters(editor)
    with pytest.raises(InvalidEdits, match=message):
        editor.edit([Edit(**fields) for fields in edits])
    assert same(editor, before)
    assert editor.stream._state is None


def test_wrong_arguments_are_named(tiny_model: ModelAdapter, tiny_editor: Callable[..., Editor]) -> None:
    with pytest.raises(ValueError, match="method must be one of nse"):
        Editor(tiny_model, method="mesmerise")
    with pytest.raises(ValueError, match="below the last layer"):
        tiny_editor(layers=(2, tiny_model.n_layers - 1))
    editor = tiny_editor()
    with pytest.raises(ValueError, match="on_error"):
        editor.edit([Edit(**GOOD)], on_error="shrug")
    with pytest.raises(ValueError, match="batch_size"):
        editor.edit([Edit(**GOOD)], batch_size=0)


def test_saved_model_loads_with_the_same_logits(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet, tmp_path: Path
) -> None:
    editor = tiny_editor()
    editor.edit(tiny_facts[:4])
    editor.save_pretrained(tmp_path / "edited")
    model, tokenizer = load_transformers(str(tmp_path / "edited"), "float32")
    ids = torch.tensor([tokenizer(tiny_facts[0].prompt)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, editor.model(ids).logits)


def test_the_face_shows_what_transformers_users_expect(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor()
    assert isinstance(editor.model, transformers.PreTrainedModel)
    assert editor.tokenizer is editor.adapter.tokenizer
    assert repr(editor) == "Editor(LlamaForCausalLM, method nse, 0 edits in 0 batches)"
    editor.edit(tiny_facts[:4], batch_size=2)
    assert repr(editor) == "Editor(LlamaForCausalLM, method nse, 4 edits in 2 batches)"
    with pytest.raises(TypeError, match=r"Editor takes a ModelAdapter, got LlamaForCausalLM; .* Editor\.from_model"):
        Editor(editor.model)


def test_settings_are_replaced_where_that_is_sound(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet, tmp_path: Path
) -> None:
    editor = tiny_editor()
    with pytest.raises(TypeError, match="nse needs a NSEConfig"):
        editor.config = tiny_editor("memit").config
    with pytest.raises(ValueError, match=r"the edited layers are \(2, 3, 4\)"):
        editor.config = changed(editor.config, {"layers": [1, 2]})
    editor.config = changed(editor.config, {"value": {"steps": 3}})
    editor.edit(tiny_facts[:2], run_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="the settings of a recorded run cannot change"):
        editor.config = changed(editor.config, {"value": {"steps": 4}})


def test_several_watchers_see_every_batch(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    class Counter:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def begin(self) -> None:
            self.calls.append("begin")

        def after_batch(self, report: Any, last: bool) -> None:
            self.calls.append((report.batch, last))

    first, second = Counter(), Counter()
    editor = tiny_editor(value={"steps": 2})
    editor.edit(tiny_facts[:4], 2, watch=[first, second])
    assert first.calls == second.calls == ["begin", (0, False), (1, True)]
    editor.edit(tiny_facts[4:6], 2, watch=first)
    assert first.calls[3:] == ["begin", (0, True)]


def test_evaluate_and_export_through_the_editor(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet, tmp_path: Path
) -> None:
    editor = tiny_editor()
    editor.edit(tiny_facts[:3])
    assert editor.evaluate(fluency_prompts=0) == evaluate(editor, tiny_facts[:3], fluency_prompts=0)
    exported = editor.export(tmp_path / "delta", "delta")
    assert exported.holds == (3, 3, 3)


def test_edits_that_did_not_take_are_named(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet, tmp_path: Path
) -> None:
    editor = tiny_editor(value={"steps": 2})
    run = editor.edit(tiny_facts[:4], run_dir=tmp_path / "run")
    assert run.missed is not None
    assert run.taken == 4 - len(run.missed) < 4
    assert run.written == 4

    (missed, *_) = run.missed
    (edit,) = [edit for edit in tiny_facts[:4] if edit.case_id == missed.case_id]
    assert (missed.prompt, missed.wanted, missed.written) == (edit.prompt, edit.target_new, True)
    assert missed.got != edit.target_new
    assert str(missed).startswith(f"case {edit.case_id}: {edit.prompt!r} wanted {edit.target_new!r}, got ")

    assert editor.recorder is not None
    outcome = editor.recorder.log.records[-1]
    assert outcome.kind == "outcome"
    assert [each["case_id"] for each in outcome.body["missed"]] == [each.case_id for each in run.missed]
    assert run.to_dict()["missed"][0]["wanted"] == edit.target_new


def test_edits_that_took_and_edits_not_looked_at(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor()
    run = editor.edit(tiny_facts[:6], batch_size=3)
    assert (run.written, run.taken, run.missed) == (6, 6, ())
    unseen = editor.edit(tiny_facts[6:8], verify=False)
    assert (unseen.written, unseen.taken, unseen.missed) == (2, None, None)


def test_edits_for_which_nothing_was_written(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor(residual_min=1e6)
    before = parameters(editor)
    run = editor.edit(tiny_facts[:4], batch_size=2)
    assert same(editor, before)
    assert (run.written, run.taken) == (0, 0)
    assert run.missed is not None
    assert all(not missed.written for missed in run.missed)
    assert "(nothing was written for it)" in str(run.missed[0])


def test_a_later_edit_of_one_prompt_is_the_one_that_counts(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet
) -> None:
    first = tiny_facts[0]
    later = first.model_copy(update={"case_id": "later", "target_new": tiny_facts[1].target_new})
    run = tiny_editor().edit([first, later], batch_size=1)
    # The first edit was written and is overwritten on purpose: it is not among the missed.
    assert run.missed is not None
    assert first.case_id not in {missed.case_id for missed in run.missed}


def test_misuse_is_one_sentence(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor()
    with pytest.raises(TypeError, match="wanted a sequence of edits, got one Edit"):
        editor.edit(tiny_facts[0])
    with pytest.raises(TypeError, match="wanted a sequence of texts, got one text"):
        editor.ask("The capital of")
    with pytest.raises(TypeError, match="config: wanted whole settings, got dict"):
        editor.config = {"rounds": 2}
    with pytest.raises(ValueError, match="undo: 0 batches are in force, asked to keep 5"):
        editor.undo(to=5)
    for name, value in (("last", 1.5), ("to", "1"), ("last", True)):
        with pytest.raises(TypeError, match=f"undo: wanted a whole number of batches as {name}, got {value!r}"):
            editor.undo(**{name: value})
    editor.edit(tiny_facts[:1])
    with pytest.raises(ValueError, match="undo: 1 batch is in memory or recorded, asked for 2"):
        editor.undo(last=2)


WITHOUT_SUBJECT = Edit(prompt="The banner of Logan is", target_new="purple")


@pytest.mark.parametrize("method", ["fine", "kne", "kn"])
def test_methods_that_read_no_subject_ask_for_none(tiny_editor: Callable[..., Editor], method: str) -> None:
    editor = tiny_editor(method)
    run = editor.edit([WITHOUT_SUBJECT])
    assert [edit.subject for edit in run.edits] == [None]
    assert editor.method.needs_subject is False


def test_methods_that_look_up_a_subject_ask_for_it(tiny_editor: Callable[..., Editor]) -> None:
    editor = tiny_editor()
    before = parameters(editor)
    with pytest.raises(InvalidEdits, match=r"edits\[0\]: case 0, field 'subject': is missing; methods that locate"):
        editor.edit([WITHOUT_SUBJECT])
    assert same(editor, before)


def closing(editor: Editor) -> Any:
    """The editor's tokenizer, but with the end token behind every text."""
    tokenizer = copy.deepcopy(editor.tokenizer)
    begins, ends = (tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"]), [tokenizer.eos_token])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*begins, "$A", *ends]),
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in {*begins, *ends}],
    )
    return tokenizer


def test_nothing_is_continued_behind_an_end_that_the_tokenizer_put_there(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet
) -> None:
    editor = tiny_editor()
    prompts = [edit.prompt for edit in tiny_facts[:3]]
    answers = editor.ask(prompts)
    text = sample_background(editor.adapter, 64, 32, 0)

    editor.adapter.tokenizer = closing(editor)
    assert editor.tokenizer(prompts[0])["input_ids"][-1] == editor.tokenizer.eos_token_id
    assert editor.ask(prompts) == answers
    assert sample_background(editor.adapter, 64, 32, 0) == text


def test_a_space_at_the_end_of_a_prompt_belongs_to_the_answer(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet
) -> None:
    editor = tiny_editor()
    prompts = [edit.prompt for edit in tiny_facts[:3]]
    assert editor.ask([f"{prompt} " for prompt in prompts]) == editor.ask(prompts)


def test_a_token_without_an_embedding_is_an_error_of_the_prompt_or_record_with_it(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet, caplog: pytest.LogCaptureFixture
) -> None:
    editor = tiny_editor()
    tokenizer = copy.deepcopy(editor.tokenizer)
    tokenizer.add_tokens(["<new>"])
    larger = Editor.from_model(editor.model, tokenizer, "nse", config=editor.config, progress=False)
    (line,) = [record.getMessage() for record in caplog.records]
    rows = editor.adapter.n_embeddings
    assert line == (
        f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows: texts with one of the last"
        f" {len(tokenizer) - rows} are refused"
    )

    assert larger.ask([tiny_facts[0].prompt]) == editor.ask([tiny_facts[0].prompt])
    with pytest.raises(ValueError, match=r"the prompt 'A <new> is' has the token '<new>' of id \d+, for which"):
        larger.ask(["A <new> is"])
    wrong = tiny_facts[0].model_copy(update={"target_new": "<new>"})
    with pytest.raises(InvalidEdits, match="field 'target_new': has the token '<new>'"):
        larger.edit([wrong])


def test_what_the_end_of_a_block_would_take_back_is_refused(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet, tmp_path: Path
) -> None:
    editor = tiny_editor()
    editor.edit(tiny_facts[:1])
    before = editor.weights.fingerprint()

    with editor.temporarily(tiny_facts[1:2]):
        with pytest.raises(ValueError, match="edit: not inside `temporarily`, whose end brings"):
            editor.edit(tiny_facts[2:3])
        with editor.temporarily(tiny_facts[2:3]):
            assert len(editor.edits) == 3
        assert len(editor.edits) == 2
        editor.export(tmp_path / "temporary", "delta")
    assert editor.weights.fingerprint() == before

    with editor.unedited():
        for refused in (
            lambda: editor.edit(tiny_facts[2:3]),
            lambda: editor.save_pretrained(tmp_path / "out"),
            lambda: editor.temporarily(tiny_facts[2:3]).__enter__(),
        ):
            with pytest.raises(ValueError, match="not inside `unedited`"):
                refused()
    assert editor.weights.fingerprint() == before
    editor.edit(tiny_facts[2:3])
