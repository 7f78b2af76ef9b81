"""Finds the row of a model, and says of a model that has none what a row of it could be."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import yaml
from torch import nn

from fastedit.model.families import FAMILIES, LLAMA, Family, UnsupportedModel, find, text_config
from fastedit.model.family_file import REQUIRED

# Of the reasons why the nearest row does not fit, and of the modules of a layer: as many as a sentence bears.
REASONS_SHOWN = 4
MODULES_SHOWN = 12

# Entries in which configs keep the name of the activation.
ACTIVATIONS = ("hidden_act", "activation_function", "hidden_activation", "activation")

HOW = (
    "Correct this start of a row, save it as family.yaml, and pass --family family.yaml, or in Python"
    ' families=(read_family("family.yaml"),) with fastedit.model.family_file.read_family:'
)


def choose(model: Any, families: Sequence[Family]) -> Family:
    """The first row that fits the model.

    Raises UnsupportedModel: which modules the model has, and why the nearest row does not fit. Its notes hold a row to
    start from, as YAML, and what the fields of a row are."""
    misfits = [row.misfits(model) for row in families]
    for row, reasons in zip(families, misfits, strict=True):
        if not reasons:
            return row

    layers = _layers_path(model)
    nearest = min(range(len(families)), key=lambda i: _distance(families[i], model, layers), default=None)
    row = families[nearest] if nearest is not None and families[nearest] in FAMILIES else LLAMA
    why = "" if nearest is None else f"; {families[nearest].name!r} comes closest, but {_shown(misfits[nearest])}"
    seen = "" if layers is None else f"; {layers} holds {', '.join(_modules(find(model, layers)[0]))}"
    error = UnsupportedModel(
        f"{type(model).__name__}: no known family fits{why}{seen}; a row of your own makes it known"
        " (--family FILE, families=)"
    )

    # What BaseException.add_note sets, which Python 3.10 does not have.
    error.__notes__ = _notes(model, families, row, layers)  # type: ignore[attr-defined]
    raise error


def _notes(model: Any, families: Sequence[Family], row: Family, layers: str | None) -> list[str]:
    """What is told below the error: a row to start from, like `row`, the fields, and the known rows."""
    start = "" if layers is None else f"{HOW}\n\n{starting_row(model, row, layers)}"
    known = ", ".join(row.name for row in families)

    return [*([start] if start else []), f"The fields of a row:\n{Family.needs()}\nKnown rows: {known}."]


def starting_row(model: Any, row: Family, layers: str) -> str:
    """YAML of a row for the model, like a shipped one, with all that can be guessed from the names of its modules.

    layers: path of its decoder layers"""
    layer = find(model, layers)[0]
    inner = layers.rpartition(".")[0]
    guessed: dict[str, Any] = {
        "layers": layers,
        "embedding": _embedding(model),
        "final_norm": _named(find(model, inner) if inner else model, ("norm", "ln"), inner, last=True),
        "layer_modules": sorted(name for name, _ in layer.named_children()),
        "attention": _named(layer, ("attn", "attention")),
        **_tables(model, inner, row),
        **_projections(layer),
        **_norms(layer, row),
    }
    if row.config:
        guessed["config"] = {}
    if not hasattr(text_config(model), row.activation):
        guessed["activation"] = next(
            (name for name in ACTIVATIONS if hasattr(text_config(model), name)), row.activation
        )

    found = {name: value for name, value in guessed.items() if value is not None or name not in REQUIRED}
    differing = {name: value for name, value in found.items() if value != _plain(row, name)}
    name = getattr(text_config(model), "model_type", None) or type(model).__name__

    return yaml.safe_dump({"like": row.name, "name": name, **differing}, sort_keys=False)


def _distance(row: Family, model: Any, layers: str | None) -> tuple[int, bool]:
    """How far a row is from a model: in how much its layers differ; of two that are as far, the one that asks nothing
    of the config is nearer.

    layers: path of the decoder layers; None = not known, so that all parts are counted"""
    if layers is None:
        return len(row.misfits(model)), bool(row.config)

    found = row.layers_misfits(find(model, layers))

    return len(found), bool(row.config)


def _layers_path(model: Any) -> str | None:
    """Path of the list of modules with the most parameters, which the decoder layers are; None without a list."""
    sizes = {
        path: sum(parameter.numel() for parameter in part.parameters())
        for path, part in model.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) and any(True for _ in part[0].children())
    }

    return max(sizes, key=lambda path: sizes[path], default=None)


def _modules(layer: nn.Module) -> list[str]:
    """Names of the parts of a layer that have parameters of their own, at most `MODULES_SHOWN`."""
    names = [path for path, part in layer.named_modules() if path and any(True for _ in part.parameters(recurse=False))]

    return names[:MODULES_SHOWN] + (["and more"] if len(names) > MODULES_SHOWN else [])


def _shown(reasons: Sequence[str]) -> str:
    more = len(reasons) - REASONS_SHOWN

    return ", ".join(reasons[:REASONS_SHOWN]) + (f", and {more} more" if more > 0 else "")


def _embedding(model: Any) -> str | None:
    """Path of the token embedding, None where the model cannot say which it is."""
    with contextlib.suppress(NotImplementedError, AttributeError):
        embedding = model.get_input_embeddings()
        return next((path for path, part in model.named_modules() if part is embedding), None)

    return None


def _named(module: Any, words: Sequence[str], before: str = "", last: bool = False) -> str | None:
    """Path of a child of `module` with one of these words in its name: the first, or the last."""
    names = [name for name, _ in module.named_children() if any(word in name for word in words)]

    return None if not names else f"{before}.{names[-1 if last else 0]}".removeprefix(".")


def _tables(model: Any, inner: str, row: Family) -> dict[str, Any]:
    """Paths of the rotary and the learned positions beside the layers, None where there are none."""
    owner = find(model, inner) if inner else model
    rotary = _named(owner, ("rotary", "rope"), inner)
    learned = _named(owner, ("embed_positions", "wpe", "position_emb"), inner)
    has_own = row.rotary is not None and find(model, row.rotary) is not None

    return {"positions": learned, "rotary": row.rotary if rotary is None and has_own else rotary}


def _projections(layer: nn.Module) -> dict[str, Any]:
    """Paths of gate, up and down, by the shapes of the linear layers that are not in the attention."""
    linear = {
        path: part.weight.shape
        for path, part in layer.named_modules()
        if isinstance(part, nn.Linear) and not any(word in path for word in ("attn", "attention"))
    }
    downs = [path for path, shape in linear.items() if shape[0] < shape[1]]
    if not downs:
        return {}

    d_model, d_ff = linear[downs[-1]]
    into = [path for path, shape in linear.items() if shape[1] == d_model and shape[0] in (d_ff, 2 * d_ff)]
    gates = [path for path in into if "gate" in path] or into[:1]
    if not gates:
        return {"down": downs[-1]}

    both = linear[gates[0]][0] == 2 * d_ff
    others = [path for path in into if path not in gates]
    up = gates[0] if both else others[0] if others else None

    return {"gate": gates[0], "up": up, "down": downs[-1]}


def _norms(layer: nn.Module, row: Family) -> dict[str, Any]:
    """Names of the one or two norms in front of the halves, in the order in which they stand in the layer.

    Nothing for more norms, or where the row has none in front of its attention."""
    names = [name for name, _ in layer.named_children() if "norm" in name or "ln" in name]
    if row.attention_norm is None or not 0 < len(names) < 3:
        return {}
    if len(names) == 1:
        return {"attention_norm": names[0], "ffn_norm": None, "parallel": True}

    # A parallel layer may have two as well.
    parallel = row.parallel and row.ffn_norm is not None

    return {"attention_norm": names[0], "ffn_norm": names[1], "parallel": parallel}


def _plain(row: Family, name: str) -> Any:
    value = getattr(row, name)

    return sorted(value) if name == "layer_modules" else dict(value) if name == "config" else value
