"""The methods, by name. A recipe writes one batch of edits inside a trial; the editor commits it."""

from __future__ import annotations

from fastedit.recipes.base import BatchResult, EditState, Recipe
from fastedit.recipes.nse import nse

RECIPES: dict[str, Recipe] = {"nse": nse}

__all__ = ["RECIPES", "BatchResult", "EditState", "Recipe"]
