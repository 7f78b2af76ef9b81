"""The methods, by name. A recipe writes one batch of edits inside a trial; the editor commits it."""

from __future__ import annotations

from fastedit.method import Method
from fastedit.recipes.alphaedit import ALPHAEDIT
from fastedit.recipes.memit import MEMIT
from fastedit.recipes.nse import NSE

RECIPES: dict[str, Method] = {"nse": NSE, "memit": MEMIT, "alphaedit": ALPHAEDIT}

__all__ = ["RECIPES"]
