"""Other weights for a while: swapped, and back to the very tensors."""

from __future__ import annotations

import pytest
import torch

from fastedit.model.adapter import ModelAdapter
from fastedit.weights.stand_in import standing_in


def test_inside_the_block_and_after_it(tiny_model: ModelAdapter) -> None:
    name = tiny_model.weight_name(3)
    before = tiny_model.down_parameter(3).data
    copy = before.clone()
    other = torch.randn_like(before)

    with standing_in(tiny_model, {name: other}):
        assert torch.equal(tiny_model.down_weight(3), other)
    assert tiny_model.down_parameter(3).data.data_ptr() == before.data_ptr()
    assert torch.equal(tiny_model.down_parameter(3), copy)

    with pytest.raises(ZeroDivisionError), standing_in(tiny_model, {name: other}):
        _ = 1 // 0
    assert torch.equal(tiny_model.down_parameter(3), copy)

    with pytest.raises(KeyError, match="nothing"), standing_in(tiny_model, {"nothing": other}):
        pytest.fail("the block must not run")


def test_tied_weights_follow(tiny_model: ModelAdapter) -> None:
    embedding = dict(tiny_model.model.named_parameters())["model.embed_tokens.weight"]
    with standing_in(tiny_model, {"model.embed_tokens.weight": torch.zeros_like(embedding)}):
        assert not bool(tiny_model.model.get_output_embeddings().weight.any())
    assert bool(tiny_model.model.get_output_embeddings().weight.any())
