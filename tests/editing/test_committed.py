"""What an editor keeps to forget its last batches: the state once, and what it took in since."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastedit.editing.committed import History
from fastedit.methods.closed_form.recipe import EditState
from fastedit.methods.closed_form.solver import PastKeys
from fastedit.records.edit import EditSet

D_FF = 12
N_BATCHES = 9
KEPT = [{"2": each} for each in torch.randn(N_BATCHES, 2, D_FF, generator=torch.Generator().manual_seed(0))]


def fresh(**nothing: Any) -> EditState:
    """A state of past keys alone; they turn from rows into their sum within the fourth batch."""
    return EditState(templates=(), upper=nothing.get("upper"), moments={}, solvers={}, past={2: PastKeys(D_FF)})


def bits(state: EditState) -> dict[str, bytes]:
    return {name: each.numpy().tobytes() for name, each in state.tensors().items()}


def after(n: int) -> dict[str, bytes]:
    state = fresh()
    for kept in KEPT[:n]:
        state.take_in(kept)
    return bits(state)


def went_through(n: int, depth: int) -> tuple[History, EditState]:
    history, state = History(), fresh()
    for number, kept in enumerate(KEPT[:n], 1):
        history.append(EditSet(()), state, kept, min(number, depth))
    return history, state


@pytest.mark.parametrize("depth", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_undone_and_gone_on_bit_for_bit(n: int, depth: int) -> None:
    for taken in range(1, min(n, depth) + 1):
        history, state = went_through(n, depth)
        assert bits(state) == after(n)
        history.undo(taken, state, min(n, depth))
        assert len(history) == n - taken
        assert bits(state) == after(n - taken)
        left = min(n, depth) - taken
        if left:
            history.undo(1, state, left)
            assert bits(state) == after(n - taken - 1)
            history.append(EditSet(()), state, KEPT[n - taken - 1], left)
        history.append(EditSet(()), state, KEPT[n - taken], left + 1)
        assert bits(state) == after(n - taken + 1)
        history.undo(1, state, left + 1)
        assert bits(state) == after(n - taken)


def test_the_state_is_kept_once() -> None:
    history, state = went_through(N_BATCHES, 3)
    assert [batch.before is not None for batch in history._batches] == [n == 6 for n in range(N_BATCHES)]
    assert [batch.kept is not None for batch in history._batches] == [n >= 6 for n in range(N_BATCHES)]
    assert "2/dense" in state.tensors()


def test_a_copy_goes_its_own_way() -> None:
    history, state = went_through(5, 3)
    before = {name: each.clone() for name, each in state.tensors().items()}
    aside = history.copy()
    for number, kept in enumerate(KEPT[5:9], 1):
        aside.append(EditSet(()), state, kept, min(number, 2))
    state.load(before)
    history.undo(2, state, 3)
    assert bits(state) == after(3)


def test_nothing_is_kept_where_nothing_can_be_undone() -> None:
    history, state = History(), fresh()
    for kept in KEPT:
        history.append(EditSet(()), state, kept, 0)
    assert all(batch.before is batch.kept is None for batch in history._batches)
    assert bits(state) == after(N_BATCHES)
