"""Fixtures for the runs of earlier versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def older_moments() -> dict[int, torch.Tensor]:
    """layer -> second moment (d_ff, d_ff) of the runs of earlier versions, whose file holds lower triangles."""
    unpacked = {}
    path = Path(__file__).resolve().parent / "written_by_0.1.0" / "moments.safetensors"
    for layer, packed in load_file(path).items():
        d_ff = int((2 * len(packed)) ** 0.5)
        rows, columns = torch.tril_indices(d_ff, d_ff).unbind()

        moment = torch.zeros(d_ff, d_ff)
        moment[rows, columns] = packed
        moment[columns, rows] = packed
        unpacked[int(layer)] = moment
    return unpacked
