"""The hot steps, one public function per file, each with a plain-torch reference beside it.

`with backend("cpp"):` chooses what runs them, see docs/ops.md.
"""

from fastedit.ops._dispatch import BACKENDS, BackendUnavailable, backend

__all__ = ["BACKENDS", "BackendUnavailable", "backend"]
