"""What holds for every argument of every op on every backend: devices, empty dimensions, memory, autograd, autocast."""

from importlib import import_module
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastedit.ops import _dispatch
from fastedit.ops._check import _overlaps, apart, require_one_device
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


def test_autocast_changes_nothing(call, backend, device):
    expected = run(call, arguments(call, device=device))
    with torch.autocast(device, dtype=torch.bfloat16):
        found = run(call, arguments(call, device=device))
    assert_same_bits(found, expected)


def test_autograd_records_nothing_whatever_the_grad_mode(call, backend, device):
    """Only `sparse_delta` is differentiable. Leaves that require a gradient are written as others are."""
    with torch.no_grad():
        expected = run(call, arguments(call, device=device))
    given = arguments(call, device=device)
    for value in tensors(given).values():
        value.requires_grad_(value.is_floating_point())
    found = run(call, given)
    assert_same_bits(found, expected)
    given_ones = {id(value) for value in tensors(given).values()}
    for one in found:
        assert one.requires_grad is (call == "sparse_delta") or id(one) in given_ones


def test_what_is_written_in_place_has_a_new_version_and_nothing_else(call, backend, device):
    given = arguments(call, device=device)
    before = {name: value._version for name, value in tensors(given).items()}
    run(call, given)
    for name, value in tensors(given).items():
        assert (value._version > before[name]) is (name in WRITTEN.get(call, ()))


def test_a_graph_that_has_saved_what_is_written_notices(call, backend, device):
    for name in WRITTEN.get(call, ()):
        given = arguments(call, device=device)
        factor = torch.ones_like(given[name], requires_grad=True)
        loss = (factor * given[name]).sum()
        run(call, given)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_lazily_negated_inputs_are_read_negated(call, backend, device):
    given = arguments(call, device=device)
    expected = run(call, arguments(call, device=device))
    for name in set(ordered(call, given)) - set(WRITTEN.get(call, ())):
        if given[name].is_floating_point():
            given[name] = torch._neg_view(-given[name])
    assert_same_bits(run(call, given), expected)


def test_zero_tensors_are_read_as_zeros(call, backend, device):
    for name in ordered(call, arguments(call)):
        given, zeros = arguments(call, device=device), arguments(call, device=device)
        if name in WRITTEN.get(call, ()) or not given[name].is_floating_point():
            continue
        zeros[name] = torch.zeros_like(given[name])
        given[name] = torch._efficientzerotensor(given[name].shape, dtype=given[name].dtype, device=device)
        assert_same_bits(run(call, given), run(call, zeros))


def test_expanded_inputs_are_read_as_their_copies(call, backend, device):
    for name in ordered(call, arguments(call)):
        for dim in range(arguments(call)[name].dim()):
            given, copied = arguments(call, device=device), arguments(call, device=device)
            if name in WRITTEN.get(call, ()) or not given[name].is_floating_point():
                continue
            given[name] = given[name].narrow(dim, 0, 1).expand_as(given[name])
            copied[name] = given[name].clone(memory_format=torch.contiguous_format)
            for one, other in zip(run(call, given), run(call, copied), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_rows_with_gaps_between_them_are_read_and_written_as_whole_ones(call, backend, device):
    """A history of more rows than are used, the columns of a wider matrix: the row stride is not the width."""
    expected = run(call, arguments(call, device=device))
    given = arguments(call, device=device)
    wide = {}
    for name, value in tensors(given).items():
        if value.is_floating_point() and value.dim() > 1:
            wide[name] = value.new_full((*value.shape[:-1], value.shape[-1] + 3), float("nan"))
            given[name] = wide[name][..., : value.shape[-1]].copy_(value)
    for one, other in zip(run(call, given), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    for name, value in wide.items():
        assert value[..., given[name].shape[-1] :].isnan().all()


def shared_memory(value, kind):
    """A tensor like `value` that cannot be written element by element."""
    rows, columns = value.shape
    if kind == "rows":
        return value[:1].clone().expand(rows, columns)
    if kind == "columns":
        return value[:, :1].clone().expand(rows, columns)
    if kind == "windows":
        return value.new_zeros(rows + columns).as_strided((rows, columns), (1, 1))
    if kind == "negated":
        return torch._neg_view(value)
    return torch._efficientzerotensor(value.shape, dtype=value.dtype, device=value.device)


@pytest.mark.parametrize("kind", ["rows", "columns", "windows", "negated", "zero"])
def test_what_cannot_be_written_in_place_is_refused_and_changes_nothing(kind, call, backend, device):
    for name in WRITTEN.get(call, ()):
        given = arguments(call, device=device)
        given[name] = shared_memory(given[name], kind)
        before = {key: value.clone() for key, value in tensors(given).items()}
        with pytest.raises(ValueError, match=f"{call}: {name} is written in place, got"):
            run(call, given)
        assert all(torch.equal(value, before[key]) for key, value in tensors(given).items())


@pytest.mark.parametrize(
    ("shape", "strides", "shared"),
    [
        ((3, 4), (4, 1), False),
        ((3, 4), (1, 3), False),
        ((3, 4), (5, 1), False),
        ((3, 4), (3, 1), True),
        ((3, 4), (2, 3), False),
        ((4, 3), (2, 3), True),
        ((2, 3), (3, 2), False),
        ((1, 4), (0, 1), False),
        ((2, 1), (0, 1), True),
        ((2, 2), (0, 0), True),
        ((0, 4), (0, 0), False),
        ((1, 1), (0, 0), False),
    ],
)
def test_shared_memory_is_seen_in_the_strides(shape, strides, shared):
    value = torch.zeros(40).as_strided(shape, strides)
    elements = [row * strides[0] + column * strides[1] for row in range(shape[0]) for column in range(shape[1])]
    assert (len(set(elements)) < len(elements)) is shared
    assert _overlaps(value) is shared


@pytest.mark.parametrize("wrong", [-1, CASE.d_ff])
def test_an_index_outside_of_the_layer_is_refused_and_changes_nothing(wrong, call, backend):
    given = arguments(call)
    if "index" not in given:
        pytest.skip("no index")
    given["index"] = given["index"].clone().index_fill_(0, torch.tensor([1]), wrong)
    before = {key: value.clone() for key, value in tensors(given).items()}
    error = ValueError if call.startswith("sparse_delta") else IndexError
    wanted = "out of range" if backend == "triton" and error is IndexError else rf"{call}: index must be in \[0, 20\)"
    with pytest.raises(error, match=wanted):
        run(call, given)
    assert all(torch.equal(value, before[key]) for key, value in tensors(given).items())
