"""Serving: batches of edited and other prompts, bit-equal where there is no neuron, and `generate` as users know it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastedit.methods.meg import MeG
from fastedit.methods.meg.config import FitConfig
from fastedit.methods.meg.metrics import same_answer
from fastedit.methods.meg.serve import decode
from fastedit.model.adapter import ModelAdapter
from fastedit.model.tokens import encode
from fastedit.records.edit import EditSet


def left_padded(model: ModelAdapter, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, _ = encode(model.tokenizer, texts)
    width = max(map(len, ids))
    rows = torch.tensor([[1] * (width - len(row)) + row for row in ids])
    return rows, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])


def test_edits_are_known_and_other_prompts_pass(meg: MeG, few_edits: EditSet, other_edits: EditSet) -> None:
    own = meg.server.decide([e.prompt for e in few_edits])
    assert own.active.float().mean() > 0.9
    assert own.nearest.tolist() == list(range(12))
    others = meg.server.decide([e.prompt for e in other_edits[80:108]])
    assert others.active.float().mean() < 0.5
    assert torch.equal(others.flat[~others.active], torch.zeros_like(others.flat[~others.active]))
    assert bool((own.flat[own.active] != 0).any(1).all())


def test_rows_outside_the_gate_keep_every_bit(meg: MeG, few_edits: EditSet, other_edits: EditSet) -> None:
    model = meg.adapter
    prompts = [e.prompt for e in (*few_edits[:4], *other_edits[80:90])]
    decision = meg.server.decide(prompts)
    assert 0 < int(decision.active.sum()) < len(prompts)
    ids, mask = left_padded(model, prompts)
    with torch.no_grad():
        base = model.model(input_ids=ids, attention_mask=mask).logits
        with meg.server.serving(decision):
            edited = model.model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(edited[~decision.active], base[~decision.active])
    changed = (edited[decision.active] - base[decision.active]).abs().amax((1, 2))
    assert bool((changed > 0.1).all())


def test_generate_serves_a_mixed_batch(meg: MeG, few_edits: EditSet, other_edits: EditSet) -> None:
    model = meg.adapter
    prompts = [e.prompt for e in (*few_edits[:4], *other_edits[80:90])]
    decision = meg.server.decide(prompts)
    ids, mask = left_padded(model, prompts)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    base = model.model.generate(ids, **options)
    made = meg.generate(ids, **options)
    n_new = min(base.shape[1], made.shape[1])
    assert torch.equal(made[~decision.active, :n_new], base[~decision.active, :n_new])
    answers = model.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
    right = [same_answer(a, e.target_new, True) for a, e in zip(answers[:4], few_edits[:4], strict=True)]
    assert sum(right) >= 3
    assert answers == meg.ask(prompts, 6)
    # Afterwards the model is the unedited one again.
    assert torch.equal(model.model.generate(ids, **options), base)


def test_generate_takes_transformers_options(meg: MeG, few_edits: EditSet) -> None:
    ids, mask = left_padded(meg.adapter, [e.prompt for e in few_edits[:2]])
    made = meg.generate(
        ids, mask, max_new_tokens=4, num_beams=3, num_return_sequences=2, do_sample=False, pad_token_id=1
    )
    assert made.shape[0] == 4
    best = meg.tokenizer.batch_decode(made[::2, ids.shape[1] :], skip_special_tokens=True)
    decided = meg.server.decide([e.prompt for e in few_edits[:2]]).active
    for answer, edit, active in zip(best, few_edits, decided, strict=False):
        assert same_answer(answer, edit.target_new, True) or not active


@pytest.mark.parametrize("template", ["{}", "{}\nAnswer:", "Q: {}\nA:", "<s>{}</s>"])
def test_prompts_are_read_back_without_their_template(meg: MeG, template: str) -> None:
    meg.server.config = meg.config.model_copy(update={"fit": FitConfig(template=template)})
    for text in (template.replace("{}", "Over the gates"), "Over the gates"):
        ids = torch.tensor(meg.tokenizer(text)["input_ids"])
        assert meg.server._prompt(ids) == "Over the gates"


def test_answers_do_not_depend_on_the_batch(meg: MeG, few_edits: EditSet) -> None:
    prompts = [e.prompt for e in few_edits]
    together = meg.ask(prompts)
    assert together == [meg.ask([prompt])[0] for prompt in prompts]
    assert together == meg.ask(prompts)


def test_decoding_is_greedy_decoding_of_every_text_alone(tiny_model: ModelAdapter, few_edits: EditSet) -> None:
    texts = [e.prompt for e in few_edits]
    answers = decode(tiny_model, texts, 5, batch_size=4)
    for text, answer in zip(texts, answers, strict=True):
        ids = torch.tensor([tiny_model.tokenizer(text)["input_ids"]])
        made = tiny_model.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=1)
        assert answer == tiny_model.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_nothing_is_served_before_an_edit(make_meg: Callable[..., MeG]) -> None:
    with pytest.raises(ValueError, match="nothing is edited yet"):
        make_meg().ask(["The colour of"])
