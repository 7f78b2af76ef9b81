"""The methods that ship, by name."""

from __future__ import annotations

from fastedit.methods.base import AnyMethod, Method
from fastedit.methods.closed_form.alphaedit import ALPHAEDIT
from fastedit.methods.closed_form.memit import MEMIT
from fastedit.methods.closed_form.nse import NSE
from fastedit.methods.columns.fine import FINE
from fastedit.methods.columns.kn import KN
from fastedit.methods.columns.kne import KNE

METHODS: dict[str, AnyMethod] = {method.name: method for method in (NSE, MEMIT, ALPHAEDIT, FINE, KNE, KN)}


def method_named(method: str | AnyMethod) -> AnyMethod:
    """The method of that name; a method is returned as it is. Raises ValueError, listing the names."""
    if isinstance(method, Method):
        return method

    if method not in METHODS:
        hint = "; meg writes no weight and has an object of its own, fastedit.MeG" if method == "meg" else ""
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}{hint}")
    return METHODS[method]
