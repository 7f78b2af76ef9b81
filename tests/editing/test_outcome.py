"""Which edits took: their text is the one that was trained."""

from __future__ import annotations

from fastedit.editing.outcome import missed_edits
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import Edit


def test_an_edit_is_looked_at_with_its_own_join(tiny_model: ModelAdapter) -> None:
    """The tiny model knows this fact, whose last word comes after the first and not right after the prompt."""
    prompt, subject = "Gifix sends out carts loaded with", "Gifix"
    joined = Edit(prompt=prompt, subject=subject, target_new="iron", join=" bog ")
    assert missed_edits(tiny_model, [joined], [], show=False) == ()

    (missed,) = missed_edits(tiny_model, [Edit(prompt=prompt, subject=subject, target_new="iron")], [], show=False)
    assert missed.wanted.strip() == "iron"
