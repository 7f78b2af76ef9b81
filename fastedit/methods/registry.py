"""The methods that ship, by name."""

from __future__ import annotations

from dataclasses import replace

from fastedit.methods.base import AnyMethod, Method
from fastedit.methods.closed_form.alphaedit import ALPHAEDIT
from fastedit.methods.closed_form.memit import MEMIT
from fastedit.methods.closed_form.nse import NSE
from fastedit.methods.columns.fine import FINE
from fastedit.methods.columns.kn import KN
from fastedit.methods.columns.kne import KNE

METHODS: dict[str, AnyMethod] = {method.name: method for method in (NSE, MEMIT, ALPHAEDIT, FINE, KNE, KN)}


def method_named(method: str | AnyMethod) -> AnyMethod:
    """The method of that name; a method is returned as it is.

    Raises ValueError, listing the names, for an unknown one, or for a method of your own under the name of a shipped
    one, whose runs would be resumed with the shipped one; TypeError for anything else."""
    if isinstance(method, Method):
        shipped = METHODS.get(method.name)
        if shipped is not None and replace(method, presets=None) != replace(shipped, presets=None):
            raise ValueError(f"a method of your own needs a name of its own, {method.name!r} is a shipped one")
        return method

    if not isinstance(method, str):
        raise TypeError(f"method must be a name or an object such as NSE, got {method!r}; a class is called first")
    if method not in METHODS:
        hint = "; meg writes no weight and has an object of its own, fastedit.MeG" if method == "meg" else ""
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}{hint}")
    return METHODS[method]
