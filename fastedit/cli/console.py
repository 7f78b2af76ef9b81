"""What the commands share: messages to standard error, results to standard output, exit codes."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]


class Unwritten(RuntimeError):
    """Edits were asked for, and nothing was written for any of them."""


@contextlib.contextmanager
def errors(console: Console) -> Iterator[None]:
    """Errors a user can cause become one message and an exit code; anything else is ours and keeps its traceback."""
    from fastedit.methods.closed_form.second_moments import BadMoments
    from fastedit.model.families import UnsupportedModel
    from fastedit.model.load import ModelNotFound
    from fastedit.records.edit import InvalidEdits
    from fastedit.runs.log import RunWriteError
    from fastedit.runs.reports import BatchRejected
    from fastedit.runtime.places import NotSaved

    try:
        yield
    except (BatchRejected, NotSaved, RunWriteError, Unwritten) as error:
        _tell(console, error)
        raise typer.Exit(1) from error
    except (InvalidEdits, ModelNotFound, UnsupportedModel, BadMoments, OSError, ValueError) as error:
        _tell(console, error)
        raise typer.Exit(2) from error


def open_console() -> Console:
    """The console of the error stream, with warnings shown on it."""
    console = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    return console


def say(console: Console, text: str) -> None:
    """A message, as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def emit(as_json: bool, data: dict[str, Any], text: str) -> None:
    """The result of a command."""
    typer.echo(json.dumps(data) if as_json else text)


def _tell(console: Console, error: Exception) -> None:
    console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)


def given(context: typer.Context) -> set[str]:
    """Names of the command's parameters that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def refuse(given: Collection[str], unused: Mapping[str, str]) -> None:
    """Raise ValueError, one sentence per option, if a given option would do nothing.

    given: names of the command's parameters that stand on the command line
    unused: name of a parameter -> why its option is refused"""
    sentences = [sentence for name, sentence in unused.items() if name in given]
    if sentences:
        raise ValueError("\n".join(sentences))
