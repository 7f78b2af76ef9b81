"""What an editor keeps to undo its last batches: the state once, and what it added since."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastedit.editing.committed import CommittedBatches
from fastedit.methods.closed_form.recipe import ClosedFormState
from fastedit.methods.closed_form.solver import PastKeys
from fastedit.records.edit import EditSet
from fastedit.weights.trial import Trial

D_FF = 12
N_BATCHES = 9
KEPT = [{"2": each} for each in torch.randn(N_BATCHES, 2, D_FF, generator=torch.Generator().manual_seed(0))]


def fresh(**nothing: Any) -> ClosedFormState:
    """A state of past keys alone; they turn from rows into their sum within the fourth batch."""
    return ClosedFormState(templates=(), upper=nothing.get("upper"), moments={}, solvers={}, past={2: PastKeys(D_FF)})


def bits(state: ClosedFormState) -> dict[str, bytes]:
    return {name: each.numpy().tobytes() for name, each in state.tensors().items()}


def after(n: int) -> dict[str, bytes]:
    state = fresh()
    for kept in KEPT[:n]:
        state.take_in(kept)
    return bits(state)


def append(committed: CommittedBatches, state: ClosedFormState, kept: dict[str, torch.Tensor]) -> None:
    """A committed batch that wrote no weight."""
    weights: Any = None
    committed.append(EditSet(()), Trial(weights), state, kept)


def went_through(n: int, depth: int) -> tuple[CommittedBatches, ClosedFormState]:
    committed, state = CommittedBatches(depth), fresh()
    for kept in KEPT[:n]:
        append(committed, state, kept)
    return committed, state


@pytest.mark.parametrize("depth", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [3, 4, 5, 8])
def test_undone_and_gone_on_bit_for_bit(n: int, depth: int) -> None:
    for taken in range(1, min(n, depth) + 1):
        committed, state = went_through(n, depth)
        assert bits(state) == after(n)

        committed.undo(taken, state)
        assert len(committed) == n - taken
        assert bits(state) == after(n - taken)
        assert committed.undoable == min(n, depth) - taken

        if committed.undoable:
            committed.undo(1, state)
            assert bits(state) == after(n - taken - 1)
            append(committed, state, KEPT[n - taken - 1])
        append(committed, state, KEPT[n - taken])
        assert bits(state) == after(n - taken + 1)

        committed.undo(1, state)
        assert bits(state) == after(n - taken)


def test_more_than_memory_holds_is_refused_with_nothing_changed() -> None:
    committed, state = went_through(5, 2)
    with pytest.raises(ValueError, match="2 batches are in memory, asked for 3"):
        committed.undo(3, state)
    assert len(committed) == 5
    assert bits(state) == after(5)


def test_the_state_is_stored_once() -> None:
    committed, state = went_through(N_BATCHES, 3)
    assert [batch.before is not None for batch in committed._batches] == [n == 6 for n in range(N_BATCHES)]
    assert [batch.kept is not None for batch in committed._batches] == [n >= 6 for n in range(N_BATCHES)]
    assert "2/dense" in state.tensors()


def test_batches_after_others_leave_those_as_they_are() -> None:
    committed, state = went_through(5, 3)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}

    aside = CommittedBatches(2, committed)
    assert (len(aside), aside.undoable) == (5, 0)
    for kept in KEPT[5:9]:
        append(aside, state, kept)

    state.load(before)
    committed.undo(2, state)
    assert bits(state) == after(3)


def test_nothing_is_stored_where_nothing_can_be_undone() -> None:
    committed, state = CommittedBatches(0), fresh()
    for kept in KEPT:
        append(committed, state, kept)
    assert all(batch.before is batch.kept is None for batch in committed._batches)
    assert bits(state) == after(N_BATCHES)
