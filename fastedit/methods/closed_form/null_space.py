"""Null spaces of second moments for AlphaEdit: the directions that background keys hardly use.

The eigenvectors of C are stored beside the second moments, under a name made from the bytes of C, and are computed
once for all thresholds.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastedit.methods.closed_form.second_moments import BadMoments
from fastedit.runtime.available_memory import Available, available_bytes, gigabytes
from fastedit.runtime.cache import cache_folder, store_in_cache
from fastedit.runtime.hashing import tensor_bytes, tensors_hash
from fastedit.runtime.words import told_by

FORMAT = "fastedit eigenvectors 1"


def null_space(
    moment: Tensor, threshold: float, folder: Path | None = None, available: Available = available_bytes
) -> Tensor:
    """Orthonormal basis of the eigenvectors of C with eigenvalues below `threshold`, (d_ff, rank) float64.

    moment: C, (d_ff, d_ff) float32, second moment
    folder: where eigenvectors are stored; None = in the cache
    available: tells how much memory can be taken
    Raises ValueError when no eigenvalue is below the threshold, and where eigenvectors have to be computed and memory
    does not suffice; BadMoments for a damaged file."""
    eigenvalues, vectors = _eigenvectors(moment, folder or cache_folder() / "moments", available)
    basis = vectors[:, eigenvalues < threshold].to(moment.device).double()
    if basis.shape[1] == 0:
        raise ValueError(
            f"null space: no eigenvalue of the second moment is below {threshold:g}; the smallest is"
            f" {float(eigenvalues.min()):.3g}"
        )
    return basis


def _eigenvectors(moment: Tensor, folder: Path, available: Available) -> tuple[Tensor, Tensor]:
    """Eigenvalues (d_ff,) float64 and eigenvectors (d_ff, d_ff) float32, one per column, both on the CPU."""
    digest = hashlib.sha256(tensor_bytes(moment)).hexdigest()
    path = folder / f"{digest[:32]}-eigenvectors.safetensors"
    if os.path.isfile(path) and (stored := _load_eigenvectors(path, moment, digest)) is not None:
        return stored

    _check_memory(moment, available)
    return _store_eigenvectors(path, moment, digest)


def _check_memory(moment: Tensor, available: Available) -> None:
    """Raise ValueError if the eigenvectors of C cannot be computed in the available memory."""
    # The matrix, its copy that becomes the vectors, and LAPACK's two more, in float64; the vectors in float32.
    needed = 36 * moment.numel()
    left = available(moment.device)

    if left is not None and needed > left:
        raise ValueError(
            f"null space: the eigenvectors of a second moment of size {moment.shape[0]} take {gigabytes(needed)} to"
            f" compute, and {gigabytes(left)} of memory are available; free memory, or compute them on a larger"
            " machine and copy the cache folder's `moments`"
        )


def _store_eigenvectors(path: Path, moment: Tensor, digest: str) -> tuple[Tensor, Tensor]:
    """Compute the eigenvectors in float64 and write them in one atomic step; as `_eigenvectors`."""
    eigenvalues, vectors = torch.linalg.eigh(moment.double())
    tensors = {"values": eigenvalues.cpu(), "vectors": vectors.float().cpu().contiguous()}

    about = {"format": FORMAT, "moment": digest, "sha256": tensors_hash(tensors)}
    store_in_cache(path, tensors, about)
    return tensors["values"], tensors["vectors"]


def _load_eigenvectors(path: Path, moment: Tensor, digest: str) -> tuple[Tensor, Tensor] | None:
    """As `_eigenvectors`; None for a file of an earlier version, which has no checksum.

    Raises BadMoments for a damaged file and for one of another matrix."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            eigenvalues = file.get_tensor("values")
            vectors = file.get_tensor("vectors")
    except (SafetensorError, OSError) as error:
        raise BadMoments(f"{path}: not a readable file of eigenvectors ({told_by(error)})") from error

    if metadata.get("format") != FORMAT or metadata.get("moment") != digest or vectors.shape != moment.shape:
        raise BadMoments(f"{path}: does not hold the eigenvectors its name says; delete it to compute them again")

    if "sha256" not in metadata:
        return None
    if metadata["sha256"] != tensors_hash({"values": eigenvalues, "vectors": vectors}):
        raise BadMoments(f"{path}: its numbers do not match their checksum; delete it to compute them again")
    return eigenvalues, vectors
