"""The hot steps of an edit, one public function per file, each beside a reference in plain torch.

`with backend("cpp"):` chooses which implementation runs; see docs/ops.md.
"""

from fastedit.ops._dispatch import BACKENDS, BackendUnavailable, backend

__all__ = ["BACKENDS", "BackendUnavailable", "backend"]
