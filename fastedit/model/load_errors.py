"""Why a model could not be loaded, in one line: the file that is missing or damaged, else what transformers says."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError, safe_open

# The files of a folder that transformers reads as JSON.
READ = ("config.json", "generation_config.json", "*.index.json", "*token*.json", "vocab.json")

# Of a message that is passed on.
MOST_CHARACTERS = 300


class NotLoadable(ValueError):
    """A model that cannot be loaded, in a sentence that says what to do."""


def reason(error: BaseException, place: str | None = None) -> str:
    """What to tell of an error, on one line.

    place: the folder, the GGUF file or the hub id that was loaded, if it was one"""
    if isinstance(error, NotLoadable):
        return str(error)
    if place is None:
        return _said(error)

    path = Path(place)
    if path.is_dir():
        found = _damage(path, error)
    else:
        found = _damage_of_gguf(path) if path.is_file() else None

    return found or _said(error)


def _damage_of_gguf(path: Path) -> str | None:
    """What is wrong with a GGUF file, if it is."""
    from gguf import GGUFReader

    try:
        GGUFReader(path)
    except Exception as fault:  # noqa: BLE001  the reader raises whatever the bytes lead to
        return f"it is cut or no GGUF file ({_said(fault)}): get it anew"

    return None


def _damage(folder: Path, error: BaseException) -> str | None:
    """The file of a folder that is missing or damaged, if that is what the error may come from."""
    if not (folder / "config.json").is_file():
        return "it holds no config.json: give the folder in which a model was saved"

    for file in sorted(path for pattern in READ for path in folder.glob(pattern)):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as fault:
            return f"{file.name} is no JSON ({_said(fault)}): get that file anew"
        except OSError as fault:
            return f"{file.name} cannot be read ({fault.strerror})"

    missing = sorted({name for name in _shards(folder) if not (folder / name).is_file()})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"{missing[0]}{more}, which its index names, is not there: get the missing files"

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as fault:
            return f"{file.name} is cut or no safetensors file ({_said(fault)}): get that file anew"

    binary = sorted(file.name for file in folder.glob("*.bin"))
    if binary and any(isinstance(link, (pickle.UnpicklingError, EOFError)) for link in _chain(error)):
        return f"{' or '.join(binary[:3])} is cut or no file of weights: get that file anew"

    return None


def _shards(folder: Path) -> Iterator[str]:
    """Names of the files that an index of weights lists."""
    for index in folder.glob("*.index.json"):
        listed = json.loads(index.read_text(encoding="utf-8"))
        files = listed.get("weight_map") if isinstance(listed, dict) else None
        yield from (str(name) for name in (files.values() if isinstance(files, dict) else ()))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes, the last one the deepest."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _said(error: BaseException) -> str:
    """The first sentence of an error's message; with the lines below it where it only announces them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, KeyError):
        return f"{' '.join(lines)} is a name that transformers {version('transformers')} does not know, or misses"

    said = lines.pop(0)
    while said.endswith(":") and lines:
        said = f"{said} {lines.pop(0)}"

    # An old release lists all the model types that it knows.
    return said if len(said) <= MOST_CHARACTERS else f"{said[:MOST_CHARACTERS]}..."
