"""Hashes depend on what tensors hold, and one text stands for equal data."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from fastedit.runtime.hashing import canonical, tensor_bytes, tensors_hash


def test_equal_data_has_one_text() -> None:
    data = {"b": (1, 2.5), "a": {2: None, 1: True}, "c": "é"}
    assert canonical(data) == r'{"a":{"1":true,"2":null},"b":[1,2.5],"c":"\u00e9"}'
    assert canonical(data) == canonical({"c": "é", "a": {1: True, 2: None}, "b": [1, 2.5]})


def test_numbers_that_are_not_finite_become_strings() -> None:
    assert canonical([math.nan, {"x": math.inf}, -math.inf]) == '["nan",{"x":"inf"},"-inf"]'


def test_what_json_lacks_is_refused() -> None:
    with pytest.raises(TypeError, match="set"):
        canonical({"a": {1, 2}})


def test_a_hash_depends_on_names_dtypes_shapes_and_bytes() -> None:
    tensor = torch.arange(6, dtype=torch.float32).view(2, 3)
    other = torch.ones(2)
    known = tensors_hash({"a": tensor, "b": other})
    assert tensors_hash({"b": other, "a": tensor.clone()}) == known
    changed = [
        {"a": tensor, "c": other},
        {"a": tensor.view(torch.int32), "b": other},
        {"a": tensor.view(3, 2), "b": other},
        {"a": tensor + 1, "b": other},
        {"a": tensor},
    ]
    assert len({known, *map(tensors_hash, changed)}) == 1 + len(changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_bytes_are_in_row_major_order(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 0, 3], [0, 5, 6]]).to(dtype)
    rows = b"".join(bytes(tensor_bytes(row)) for row in tensor.T.contiguous())
    assert bytes(tensor_bytes(tensor.T)) == rows
    assert len(rows) == 6 * tensor.element_size()


def test_bytes_of_nothing_are_hashed() -> None:
    assert hashlib.sha256(tensor_bytes(torch.zeros(0, 3))).digest() == hashlib.sha256(b"").digest()
