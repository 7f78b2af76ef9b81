"""What a trial wrote, stored and written again: the same bits, whatever the dtype and the way it was written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from fastedit.model.adapter import ModelAdapter
from fastedit.weights.editable import EditableWeights
from fastedit.weights.trial import Trial, replay

D_MODEL, D_FF = 32, 48
SOME = torch.tensor([3, 7, 40])


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def weights(request: Any, random_llama: Any, random_tokenizer: Any) -> EditableWeights:
    return EditableWeights(ModelAdapter(random_llama.to(request.param), random_tokenizer), (1, 2))


def update(index: torch.Tensor | None, seed: int, n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = D_FF if index is None else len(index)
    # As a solver gives it: float64, column by column.
    solution = torch.randn(n, width, generator=generator, dtype=torch.float64).T
    return torch.randn(n, D_MODEL, generator=generator), solution


def bits(weights: EditableWeights) -> list[str]:
    return [weights.layer_hash(layer) for layer in weights.layers]


def through_a_file(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return load(save({name: each.contiguous() for name, each in tensors.items()}))


def test_updates_are_stored_as_factors_and_give_the_same_bits(weights: EditableWeights) -> None:
    with Trial(weights) as trial:
        trial.add(1, None, *update(None, 1))
        trial.add(2, SOME, *update(SOME, 2, n=1))
        trial.add(1, None, *update(None, 3))
        tensors, after = trial.written(), bits(weights)
    assert bits(weights) != after
    assert {name.split("/")[0] for name in tensors} == {"update"}
    assert sum(each.nbytes for each in tensors.values()) < 3 * D_FF * D_MODEL * 4
    replay(weights, through_a_file(tensors))
    assert bits(weights) == after


def test_columns_are_stored_where_they_are_smaller(weights: EditableWeights) -> None:
    with Trial(weights) as trial:
        # More edits than columns: factors would be larger.
        trial.add(1, SOME, *update(SOME, 1, n=9))
        trial.add(2, torch.tensor([5]), *update(torch.tensor([5]), 2, n=3))
        trial.add(2, torch.tensor([2, 5]), *update(torch.tensor([2, 5]), 3, n=3))
        tensors, after = trial.written(), bits(weights)
    assert {name.split("/")[0] for name in tensors} == {"columns"}
    assert tensors["columns/2/index"].tolist() == [2, 5]
    assert tensors["columns/1/values"].shape == (D_MODEL, 3)
    replay(weights, through_a_file(tensors))
    assert bits(weights) == after


def test_touched_columns(weights: EditableWeights) -> None:
    with Trial(weights) as trial:
        assert trial.touched == {}
        trial.add(1, torch.tensor([9, 4]), *update(torch.tensor([9, 4]), 2))
        trial.add(1, SOME, *update(SOME, 1))
        trial.add(2, None, *update(None, 3))
        assert trial.touched[1] is not None
        assert trial.touched[1].tolist() == [3, 4, 7, 9, 40]
        assert trial.touched[2] is None


def test_stored_columns_put_back_and_reset(weights: EditableWeights) -> None:
    start = bits(weights)
    weights.add(1, None, *update(None, 1))
    after, whole, some = bits(weights), weights.stored(1), weights.stored(1, SOME)
    weights.add(1, SOME, *update(SOME, 2))
    assert bits(weights) != after
    weights.put(1, SOME, some)
    assert bits(weights) == after
    weights.add(1, None, *update(None, 3))
    weights.put(1, None, whole)
    assert bits(weights) == after
    weights.reset()
    assert bits(weights) == start
    assert weights.changed(1) is None
