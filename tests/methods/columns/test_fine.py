"""FiNE through the editor: what is written, that it is what was trained, and that it comes back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastedit import Edit, EditSet, evaluate
from fastedit.editor import Editor
from fastedit.methods.columns.fine import FINE
from fastedit.methods.presets import load_preset, presets
from fastedit.methods.registry import METHODS
from fastedit.model.tokens import whole_sequences
from fastedit.runs.reports import BatchRejected
from fastedit.weights.trial import Trial


def worst_token(editor: Editor, edit: Edit) -> float:
    """max_j -log p(y_j) by the model's own forward."""
    (sequence,) = whole_sequences(editor.tokenizer, [edit.prompt], [edit.target_new])
    with torch.no_grad():
        logits = editor.model.eval()(input_ids=torch.tensor([sequence.ids])).logits[0]
    log_p = logits.log_softmax(-1)
    return max(-float(log_p[p, token]) for p, token in zip(sequence.scored, sequence.targets, strict=True))


def changed_columns(editor: Editor, before: dict[str, torch.Tensor]) -> dict[int, list[int]]:
    """layer -> columns of its down-projection that differ; nothing else may."""
    names = {editor.adapter.weight_name(layer): layer for layer in range(editor.adapter.n_layers)}
    found = {}
    for name, tensor in editor.model.state_dict().items():
        if torch.equal(tensor, before[name]):
            continue
        assert name in names, name
        found[names[name]] = (tensor != before[name]).any(dim=0).nonzero().flatten().tolist()
    return found


def weights_of(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_edits_of_columns_are_written_one_by_one_unless_said_otherwise(
    method: str, tiny_editor: Callable[..., Editor], tiny_facts: EditSet
) -> None:
    editor = tiny_editor(method)
    size = 1 if editor.method.by_column else 100
    assert editor.method.batch_size == size
    run = editor.edit(tiny_facts[:2])
    assert [len(report.case_ids) for report in run.batches] == [min(size, 2)] * (2 // min(size, 2))


def test_summed_changes_of_one_column_are_told(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor("fine", train={"steps": 2})
    # The second prompt is the first with another answer: the same neurons push what the model says now.
    first = tiny_facts[0]
    again = first.model_copy(update={"case_id": "again", "prompt": f"Yes. {first.prompt}"})
    (alone,) = editor.edit([first]).batches
    assert alone.notes == ()
    editor.undo()
    (both,) = editor.edit([first, again], 2).batches
    assert len(both.notes) == 1
    assert "are written by several edits of the batch" in both.notes[0]


def test_single_edits_take_and_come_back_bit_for_bit(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor("fine")
    before = weights_of(editor)
    for edit in tiny_facts[:5]:
        run = editor.edit([edit], batch_size=1)
        assert worst_token(editor, edit) < 0.2
        assert 0 < run.batches[0].steps <= editor.config.train.steps
        editor.undo()
        assert changed_columns(editor, before) == {}


def test_the_committed_model_is_the_trained_one(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor("fine")
    for edit in tiny_facts[5:9]:
        with Trial(editor.weights) as trial, torch.no_grad():
            result = FINE.write_batch(editor.stream.start, editor.state, [edit], trial)
            assert result.trained.steps[0] < editor.config.train.steps, "not stopped: the last step was not looked at"
            assert worst_token(editor, edit) == pytest.approx(float(result.trained.worst[0]), rel=1e-3)


def test_only_the_chosen_columns_change_and_none_of_a_frozen_layer(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet
) -> None:
    for frozen in (1, 4):
        editor = tiny_editor("fine", frozen_layers=frozen)
        before = weights_of(editor)
        with Trial(editor.weights) as trial, torch.no_grad():
            slots = FINE.write_batch(editor.stream.start, editor.state, tiny_facts[:6], trial).slots
            wanted: dict[int, set[int]] = {}
            for layer, neuron in zip(slots.layers.tolist(), slots.neurons.tolist(), strict=True):
                wanted.setdefault(layer, set()).add(neuron)
            assert changed_columns(editor, before) == {layer: sorted(found) for layer, found in wanted.items()}
        assert max(wanted) < editor.adapter.n_layers - frozen
        assert changed_columns(editor, before) == {}


def test_a_batch_adds_up_what_its_edits_give_alone(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor("fine")
    before = {layer: editor.adapter.down_weight(layer).clone() for layer in editor.weights.layers}
    total = {layer: torch.zeros_like(weight) for layer, weight in before.items()}
    for edit in tiny_facts[:4]:
        editor.edit([edit], batch_size=1)
        for layer, weight in before.items():
            total[layer] += editor.adapter.down_weight(layer) - weight
        editor.undo()
    editor.edit(tiny_facts[:4], batch_size=4)
    for layer, weight in before.items():
        torch.testing.assert_close(editor.adapter.down_weight(layer) - weight, total[layer], rtol=1e-3, atol=1e-4)


def test_an_edit_that_is_true_already_changes_nothing(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor("fine", train={"stop_probability": 0.2})
    known = [edit.model_copy(update={"target_new": edit.target_true}) for edit in tiny_facts[:20]]
    known = [edit for edit in known if worst_token(editor, edit) < 1]
    assert len(known) > 0
    before = weights_of(editor)
    run = editor.edit(known)
    assert run.batches[0].steps == 0
    assert changed_columns(editor, before) == {}


def test_later_edits_are_located_on_the_edited_model(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor("fine")
    before = weights_of(editor)
    run = editor.edit(tiny_facts[:6], batch_size=2)
    assert len(run.batches) == 3
    assert evaluate(editor, run.edits, fluency_prompts=0).edited["efficacy_top1"].value > 0.8
    editor.undo(3)
    assert changed_columns(editor, before) == {}
    together = tiny_editor("fine")
    together.edit(tiny_facts[:6], batch_size=6)
    editor.edit(tiny_facts[:6], batch_size=2)
    assert together.weights.fingerprint() != editor.weights.fingerprint()


def test_a_loss_that_is_no_number_is_refused(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor("fine")
    next(iter(editor.adapter.layers[-1].parameters())).data.fill_(torch.nan)
    before = editor.weights.fingerprint()
    with pytest.raises(BatchRejected, match="the loss is not finite"):
        editor.edit(tiny_facts[:2])
    assert editor.weights.fingerprint() == before


def test_half_precision_keeps_float32_masters(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    editor = tiny_editor("fine")
    half = Editor(
        type(editor.adapter)(editor.model.bfloat16(), editor.tokenizer), "fine", editor.config, progress=False
    )
    before = half.weights.fingerprint()
    half.edit(tiny_facts[:2], batch_size=1)
    assert worst_token(half, tiny_facts[1]) < 0.7
    half.undo(2)
    assert half.weights.fingerprint() == before


def test_common_neurons_are_left_out_when_asked(tiny_editor: Callable[..., Editor], tiny_facts: EditSet) -> None:
    def chosen(**changes: Any) -> tuple[Editor, list[tuple[int, int]]]:
        editor = tiny_editor("fine", background={"tokens": 300, "window": 30}, **changes)
        with Trial(editor.weights) as trial, torch.no_grad():
            slots = FINE.write_batch(editor.stream.start, editor.state, tiny_facts[:6], trial).slots
        return editor, list(zip(slots.layers.tolist(), slots.neurons.tolist(), strict=True))

    published, plain = chosen()
    assert published.state.left_out is None
    editor, found = chosen(common_share=0.01)
    common = {(layer, neuron) for layer, neuron in editor.state.left_out.nonzero().tolist()}
    assert 0 < len(common) < 300
    assert common & set(plain), "no neuron was common: the test tests nothing"
    assert not common & set(found)
    assert len(found) == len(plain)


@pytest.mark.parametrize("changes", [{}, {"common_share": 0.01, "background": {"tokens": 300, "window": 30}}])
def test_a_protected_column_is_written_once_in_a_stream(
    tiny_editor: Callable[..., Editor], tiny_facts: EditSet, changes: dict[str, Any]
) -> None:
    def stream(protect: bool) -> tuple[Editor, list[set[tuple[int, int]]]]:
        editor, found = tiny_editor("fine", protect=protect, **changes), []
        for edit in tiny_facts[:3]:
            before = weights_of(editor)
            editor.edit([edit])
            columns = changed_columns(editor, before)
            found.append({(layer, neuron) for layer, neurons in columns.items() for neuron in neurons})
        return editor, found

    _, plain = stream(False)
    assert plain[0] & plain[1] | plain[1] & plain[2], "no column is written twice anyway: the test tests nothing"
    editor, found = stream(True)
    assert found[0] == plain[0]
    assert not found[0] & found[1] | (found[0] | found[1]) & found[2]
    third = worst_token(editor, tiny_facts[2])
    editor.undo(2)
    editor.edit(tiny_facts[1:3], batch_size=1)
    assert worst_token(editor, tiny_facts[2]) == third


@pytest.mark.parametrize("frozen", [8, 60])
def test_freezing_every_layer_is_an_error(tiny_editor: Callable[..., Editor], frozen: int) -> None:
    with pytest.raises(ValueError, match="frozen_layers must be below 8"):
        tiny_editor("fine", frozen_layers=frozen)


def test_presets_say_whether_they_were_run() -> None:
    assert set(presets("fine")) == {"gpt-j-6b", "llama-2-7b", "llama-3-8b", "smollm2-135m"}
    rates: dict[str, Any] = {name: load_preset("fine", name).train.lr for name in presets("fine")}  # type: ignore[attr-defined]
    assert rates["gpt-j-6b"] == rates["llama-3-8b"] == 1e-3
    assert rates["llama-2-7b"] == 5e-3
