"""The methods, by name. A recipe writes one batch of edits inside a trial; the editor commits it."""

from __future__ import annotations

from fastedit.method import Method
from fastedit.recipes.alphaedit import ALPHAEDIT
from fastedit.recipes.fine import FINE
from fastedit.recipes.kn import KN
from fastedit.recipes.kne import KNE
from fastedit.recipes.memit import MEMIT
from fastedit.recipes.nse import NSE

RECIPES: dict[str, Method] = {"nse": NSE, "memit": MEMIT, "alphaedit": ALPHAEDIT, "fine": FINE, "kne": KNE, "kn": KN}

__all__ = ["RECIPES"]
