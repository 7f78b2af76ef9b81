"""The methods, by name. A recipe writes one batch of edits inside a trial; the editor commits it."""

from __future__ import annotations

from fastedit.methods.base import Method
from fastedit.methods.closed_form.alphaedit import ALPHAEDIT
from fastedit.methods.closed_form.memit import MEMIT
from fastedit.methods.closed_form.nse import NSE
from fastedit.methods.columns.fine import FINE
from fastedit.methods.columns.kn import KN
from fastedit.methods.columns.kne import KNE

RECIPES: dict[str, Method] = {"nse": NSE, "memit": MEMIT, "alphaedit": ALPHAEDIT, "fine": FINE, "kne": KNE, "kn": KN}

__all__ = ["RECIPES"]
