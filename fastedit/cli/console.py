"""What the commands share: messages to standard error, results to standard output, exit codes."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from safetensors import SafetensorError

from fastedit.runtime.progress import Lines
from fastedit.runtime.words import counted

if TYPE_CHECKING:
    from fastedit.runs.reports import BatchReport

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]


class Unwritten(RuntimeError):
    """Edits were asked for, and nothing was written for any of them."""


class BatchLines:
    """Tells of each batch that was committed in one line; a watcher for `Editor.edit`.

    n_batches: how many there are in all"""

    def __init__(self, lines: Lines, n_batches: int) -> None:
        self._lines = lines
        self._n_batches = n_batches

    def begin(self) -> None:
        """Nothing was written yet."""

    def after_batch(self, report: BatchReport, last: bool) -> None:
        """A rejected batch is told elsewhere, as a warning or an error."""
        if report.error is None:
            edits = counted(len(report.case_ids), "edit")
            # A method that optimises nothing has no loss.
            loss = "" if report.loss is None else f", loss {report.loss:.3g}"
            batch = f"batch {report.batch + 1} of {self._n_batches}"
            self._lines.write(f"{batch}: {edits}{loss}, {report.seconds:.1f} s")


@contextlib.contextmanager
def errors(console: Console) -> Iterator[None]:
    """Errors a user can cause become one message and an exit code; anything else is ours and keeps its traceback."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, MemoryError, SafetensorError) as error:
        code = _exit_code(error)
        if code is None:
            raise
        _tell(console, error)
        raise typer.Exit(code) from error


def _exit_code(error: Exception) -> int | None:
    """1 for what was asked for and failed, 2 for wrong input, None for an error of ours."""
    # What imports torch was imported already, or did not raise: a mistyped setting is told before torch is there.
    if "torch" in sys.modules:
        from fastedit.editing.calibration import CalibrationFailed
        from fastedit.ops._dispatch import BackendUnavailable
        from fastedit.runs.log import RunWriteError
        from fastedit.runs.reports import BatchRejected
        from fastedit.runtime.free_memory import is_out_of_memory
        from fastedit.runtime.places import NotSaved

        if isinstance(error, (BatchRejected, CalibrationFailed, NotSaved, RunWriteError)) or is_out_of_memory(error):
            return 1
        if isinstance(error, BackendUnavailable):
            return 2

    if isinstance(error, (Unwritten, SafetensorError)):
        return 1
    return 2 if isinstance(error, (OSError, ValueError)) else None


def open_console() -> Console:
    """The console of the error stream, with warnings shown on it: in columns on a terminal, else one line for each."""
    console = Console(stderr=True)
    if console.is_terminal:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    else:
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return console


def open_lines(console: Console) -> Lines | None:
    """What tells of progress where the error stream is no terminal; None where bars do."""
    return None if console.is_terminal else Lines(functools.partial(say, console))


def stage(lines: Lines | None, text: str) -> None:
    """Tell that something begins, where that is told in lines."""
    if lines is not None:
        lines.write(text)


def say(console: Console, text: str) -> None:
    """A message, as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def emit(as_json: bool, data: dict[str, Any], text: str) -> None:
    """The result of a command."""
    typer.echo(json.dumps(data) if as_json else text)


def _tell(console: Console, error: Exception) -> None:
    text = str(error) or type(error).__name__
    if isinstance(error, SafetensorError):
        text = f"a safetensors file could not be read or written: {text}"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"

    console.print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
    # Such as a file to start from.
    for note in getattr(error, "__notes__", ()):
        say(console, note)


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
