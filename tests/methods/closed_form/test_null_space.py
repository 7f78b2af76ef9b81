"""Null spaces: their span, eigenvectors stored once, damaged files refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastedit.methods.closed_form.null_space import null_space
from fastedit.methods.closed_form.second_moments import BadMoments


def moment() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64))
    return ((vectors * torch.logspace(0, -4, 20, dtype=torch.float64)) @ vectors.T).float()


@pytest.mark.parametrize("threshold", [2.0, 0.02, 0.001])
def test_basis_spans_the_small_directions(tmp_path: Path, threshold: float) -> None:
    basis = null_space(moment(), threshold, tmp_path)
    eigenvalues = torch.linalg.eigvalsh(moment().double())

    assert basis.shape == (20, int((eigenvalues < threshold).sum()))
    assert float((basis.T @ basis - torch.eye(basis.shape[1])).abs().max()) < 1e-6
    assert float((basis.T @ moment().double() @ basis).diagonal().max()) < threshold


def test_eigenvectors_are_computed_once_for_all_thresholds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = null_space(moment(), 0.02, tmp_path)
    monkeypatch.setattr(torch.linalg, "eigh", None)
    assert torch.equal(null_space(moment(), 0.02, tmp_path), first)
    assert null_space(moment(), 0.001, tmp_path).shape[1] < first.shape[1]
    with pytest.raises(TypeError):
        null_space(2 * moment(), 0.02, tmp_path)


def test_no_small_direction_is_an_error_with_the_smallest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"below 1e-05; the smallest is 0\.0001"):
        null_space(moment(), 1e-5, tmp_path)


def test_a_broken_or_foreign_file_is_refused(tmp_path: Path) -> None:
    null_space(moment(), 0.02, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    good = path.read_bytes()

    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(BadMoments, match="not a readable file"):
        null_space(moment(), 0.02, tmp_path)

    save_file({"values": torch.ones(20), "vectors": torch.eye(20)}, path, {"format": "something else"})
    with pytest.raises(BadMoments, match="delete it"):
        null_space(moment(), 0.02, tmp_path)


def test_a_flipped_bit_is_found_and_a_file_without_checksum_made_anew(tmp_path: Path) -> None:
    basis = null_space(moment(), 0.02, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    good = path.read_bytes()
    for place in (len(good) - 3, len(good) - 700, len(good) - 1500):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(BadMoments, match=r"safetensors: its numbers do not match their checksum; delete it"):
            null_space(moment(), 0.02, tmp_path)

    # As earlier versions wrote it, and wrong.
    with safe_open(path, "pt") as file:
        about = {name: text for name, text in file.metadata().items() if name != "sha256"}
    save_file({"values": torch.zeros(20, dtype=torch.float64), "vectors": torch.eye(20)}, path, about)
    assert torch.equal(null_space(moment(), 0.02, tmp_path), basis)
    with safe_open(path, "pt") as file:
        assert "sha256" in file.metadata()


def test_without_a_cache_the_bits_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    basis = null_space(moment(), 0.02, tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "file"))
    assert torch.equal(null_space(moment(), 0.02), basis)
    assert "not written" in caplog.text
    assert "FASTEDIT_CACHE names another folder" in caplog.text


def test_eigenvectors_that_do_not_fit_into_memory_are_refused_but_stored_ones_are_read(tmp_path: Path) -> None:
    c = moment()
    needed = 36 * c.numel()
    with pytest.raises(ValueError, match=r"null space: the eigenvectors .* take 0.0 GB to compute, and 0.0 GB"):
        null_space(c, 0.02, tmp_path, lambda device: needed - 1)
    basis = null_space(c, 0.02, tmp_path, lambda device: needed)
    assert torch.equal(null_space(c, 0.02, tmp_path, lambda device: 0), basis)
    assert torch.equal(null_space(c, 0.02, tmp_path / "other", lambda device: None), basis)
