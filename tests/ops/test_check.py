"""What holds for every argument of every op on every backend: devices, empty dimensions, memory, autograd, autocast."""

from importlib import import_module
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastedit.ops import _dispatch
from fastedit.ops._check import apart, require_one_device
from fastedit.ops.sparse_adam import AdamSettings
from fastedit.testing import Case, Factory

CASE = Case("arguments", 4, 20, d_model=5, n_templates=2, selected=6)
WRITTEN = {
    "apply_delta": ("weight", "master"),
    "gram_update": ("history",),
    "sparse_adam": ("delta", "moment1", "moment2"),
}
# A tensor that is not there, on a device that every build of torch has.
ELSEWHERE = "meta"


def arguments(call, case=CASE, device="cpu"):
    """The arguments of a public function by name, valid ones."""
    factory = Factory(case, device=device)
    if call == "apply_delta":
        return dict(zip(("weight", "residual", "solution", "index", "master"), factory.delta(), strict=True))
    if call == "capture_keys":
        return {**factory.capture()._asdict(), "activation": "silu"}
    if call in ("gram_update", "masked_gram"):
        moment, weight, keys, history, index = factory.gram()
        if call == "gram_update":
            return {"history": (history + history.T) / 2, "keys": keys}
        return {"moment": moment, "weight": weight, "keys": keys, "history": history, "index": index}
    if call == "score_neurons":
        return factory.scored()._asdict()
    if call == "select_neurons":
        return {"score": factory.score(), "reaching": 0.6}
    if call == "sparse_adam":
        return {**factory.adam()._asdict(), "step": 3, "settings": AdamSettings(0.1)}
    if call == "system_chain":
        _, _, past, history, _ = grams = factory.gram()
        rest = {"moment": grams.moment, "weight": grams.weight, "history": history, "past": past.clone()}
        return {**arguments("capture_keys", case, device), **rest, "reaching": 0.6}
    given = {("index" if name == "chosen" else name): value for name, value in factory.sparse()._asdict().items()}
    return given if call == "sparse_delta_grads" else {name: given[name] for name in given if name != "grad"}


def tensors(given):
    return {name: value for name, value in given.items() if isinstance(value, Tensor)}


def ordered(call, given):
    """The names of the tensors in the order of the op's argument record."""
    return [name for name in record_class(call)._fields if name in tensors(given)]


def record_class(call):
    op = call.removesuffix("_grads")
    return getattr(import_module(f"fastedit.ops.{op}"), "".join(part.capitalize() for part in op.split("_")))


def run(call, given):
    """Everything that a call returns or writes, one list of tensors."""
    found = getattr(import_module(f"fastedit.ops.{call.removesuffix('_grads')}"), call)(**given)
    if call == "system_chain":
        found = (found.keys, found.mass, *found.read())
    results = [found] if isinstance(found, Tensor) else list(found or ())
    return results + [given[name] for name in WRITTEN.get(call, ())]


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert torch.equal(one.detach(), other.detach())


@pytest.mark.parametrize("size", ["n_edits", "n_templates", "d_ff", "d_model", "selected"])
def test_every_dimension_may_be_zero(size, call, backend, device):
    sizes = {**CASE.__dict__, size: 0}
    case = Case(**{**sizes, "selected": 0} if size == "d_ff" else sizes)
    found = run(call, arguments(call, case, device))
    with _dispatch.backend("torch"):
        expected = run(call, arguments(call, case, device))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_tensor_on_another_device_is_an_error_that_names_it_and_both_devices(call, backend, device):
    first, *others = ordered(call, arguments(call))
    for name in others:
        given = arguments(call, device=device)
        before = {key: value.clone() for key, value in tensors(given).items()}
        here = str(given[first].device)
        given[name] = given[name].to(ELSEWHERE)
        with pytest.raises(ValueError, match=f"^{call}: {name} must be on {here}, the device of {first}, got meta$"):
            run(call, given)
        assert all(torch.equal(given[key], before[key]) for key in before if key != name)

    given = arguments(call, device=device)
    given[first] = given[first].to(ELSEWHERE)
    if others:
        with pytest.raises(ValueError, match=f"^{call}: .* must be on meta, the device of {first}, got {device}"):
            run(call, given)


@pytest.mark.parametrize("kind", ["cuda", "triton"])
def test_the_kernels_of_a_gpu_refuse_tensors_on_several_devices(kind, call):
    if kind not in _dispatch.kinds(call.removesuffix("_grads")):
        pytest.skip(f"no {kind} kernel")
    supports = _dispatch.module_of(call.removesuffix("_grads"), kind).supports
    given = arguments(call)
    for name in ordered(call, given)[1:]:
        said = supports(record_class(call)(**{**given, name: given[name].to(ELSEWHERE)}))
        assert name in said
        assert "cpu" in said
        assert ELSEWHERE in said


def test_tensors_on_one_device_are_not_apart():
    class Pair(NamedTuple):
        left: Tensor
        right: Tensor | None

    assert apart(Pair(torch.ones(1), None)) is None
    assert apart(Pair(torch.ones(1), torch.ones(2))) is None
    with pytest.raises(ValueError, match="pair: right must be on cpu, the device of left, got meta"):
        require_one_device("pair", Pair(torch.ones(1), torch.ones(2, device=ELSEWHERE)))
