"""Weights that something else changed: every kind of change is seen, nothing else is."""

import pytest
import torch

from fastedit.weights.fingerprint import Fingerprint, WeightsChanged

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(32, 48), (5, 7)]


def noted(dtype, shape, transposed=False):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    weight = weight.T if transposed else weight
    fingerprint = Fingerprint()
    fingerprint.note(4, weight)
    return weight, fingerprint


def one_bit(weight):
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    weight.view(bits)[3, 2] ^= 1


CHANGES = {
    "one bit": one_bit,
    "scaling": lambda weight: weight.mul_(1.01),
    "negation": lambda weight: weight.neg_(),
    "merge": lambda weight: weight.add_(torch.ones(weight.shape[0], 1).to(weight) @ weight[:1] * 1e-2),
    "one column": lambda weight: weight[:, 3].mul_(2),
    "zero": lambda weight: weight.zero_(),
    "two rows swapped": lambda weight: weight[:2].copy_(weight[:2].flip(0)),
    "nan": lambda weight: weight[0, 0].fill_(float("nan")),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_change_is_seen_though_no_version_tells_it(dtype, shape, change):
    weight, fingerprint = noted(dtype, shape)
    assert not fingerprint.differs(4, weight)
    before, version = weight.clone(), weight._version
    CHANGES[change](weight.data)
    assert weight._version == version
    assert fingerprint.differs(4, weight)
    weight.data.copy_(before)
    assert not fingerprint.differs(4, weight)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_transposed_weight_is_read_as_it_is(shape):
    weight, fingerprint = noted(torch.float32, shape, transposed=True)
    assert not fingerprint.differs(4, weight.clone())
    weight[0, 1] += 1
    assert fingerprint.differs(4, weight)


def test_another_dtype_and_another_shape_are_changes():
    weight, fingerprint = noted(torch.float32, (32, 48))
    assert fingerprint.differs(4, weight.double())
    assert fingerprint.differs(4, weight[:16])


def test_nan_that_was_noted_is_no_change():
    weight, fingerprint = noted(torch.float32, (32, 48))
    weight[0] = float("nan")
    fingerprint.note(4, weight)
    assert not fingerprint.differs(4, weight)


def test_the_error_names_the_layers_and_what_to_do():
    assert str(WeightsChanged([3])).startswith("the weights of layer 3 are not those that this editor left")
    error = WeightsChanged([3, 5])
    assert error.layers == (3, 5)
    assert "layers 3, 5 are" in str(error)
    assert "Nothing was written" in str(error)
    assert "make a new editor" in str(error)
