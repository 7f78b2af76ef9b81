"""Null spaces of second moments, for AlphaEdit: the directions that background keys hardly use.

The eigenvectors of C are stored beside the second moments under a content key of C itself, so that they are computed
once for all thresholds.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastedit.methods.closed_form.second_moments import BadMoments
from fastedit.runtime.cache import cache_folder

FORMAT = "fastedit eigenvectors 1"


def null_space(moment: Tensor, threshold: float, folder: Path | None = None) -> Tensor:
    """Orthonormal basis of the eigenvectors of C with eigenvalues below `threshold`, (d_ff, rank) float64.

    moment: (d_ff, d_ff) second moment C. folder: where eigenvectors are stored; default: the cache
    Raises ValueError when no eigenvalue is below the threshold, BadMoments for a broken stored file."""
    values, vectors = _eigenvectors(moment, folder or cache_folder() / "moments")
    basis = vectors[:, values < threshold].to(moment.device).double()
    if basis.shape[1] == 0:
        raise ValueError(
            f"null space: no eigenvalue of the second moment is below {threshold:g}; the smallest is"
            f" {float(values.min()):.3g}"
        )
    return basis


def _eigenvectors(moment: Tensor, folder: Path) -> tuple[Tensor, Tensor]:
    """Eigenvalues (d_ff,) float64 and eigenvectors (d_ff, d_ff) float32, as columns, on the CPU."""
    digest = hashlib.sha256(moment.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    path = folder / f"{digest[:32]}-eigenvectors.safetensors"
    if not path.exists():
        values, vectors = torch.linalg.eigh(moment.double())
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        stored = {"values": values.cpu(), "vectors": vectors.float().cpu().contiguous()}
        save_file(stored, partial, {"format": FORMAT, "moment": digest})
        partial.replace(path)
    # A fresh result is read back as well, so that it has the very bits that the next run will have.
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            values, vectors = file.get_tensor("values"), file.get_tensor("vectors")
    except (SafetensorError, OSError) as error:
        raise BadMoments(f"{path}: not a readable file of eigenvectors ({error})") from error
    if metadata.get("format") != FORMAT or metadata.get("moment") != digest or vectors.shape != moment.shape:
        raise BadMoments(f"{path}: does not hold the eigenvectors its name says; delete it to compute them again")
    return values, vectors
