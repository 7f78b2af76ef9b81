"""The command line: `fastedit`, with demo and doctor; the other commands are in edit, measure, suggest, runs and cache.

Results go to standard output (a table, or one JSON object with --json), progress and messages to standard error.
Exit codes: 0 done, 1 a batch was rejected, derived settings failed their check, a result was not saved, or the
installation is broken, 2 wrong input.
"""

from __future__ import annotations

from typing import Annotated

import typer

from fastedit import __version__
from fastedit.cli import runs
from fastedit.cli.cache import cache
from fastedit.cli.console import AsJson, emit, errors, open_console, open_lines
from fastedit.cli.edit import edit
from fastedit.cli.inputs import check_device, families
from fastedit.cli.measure import evaluate_command, locate, stats
from fastedit.cli.options import Device, FamilyFile, Seed
from fastedit.cli.suggest import suggest_command

app = typer.Typer(
    help="Edit facts inside transformer language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _tell_version(asked: bool) -> None:
    if not asked:
        return
    from importlib.metadata import PackageNotFoundError, version

    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    typer.echo(f"fastedit {__version__}, torch {version_of('torch')}, transformers {version_of('transformers')}")
    raise typer.Exit()


@app.callback()
def fastedit(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_tell_version,
            is_eager=True,
            help="versions of fastedit, torch, transformers",
        ),
    ] = False,
) -> None:
    """Edit facts inside transformer language models."""


app.command()(edit)
app.command("eval")(evaluate_command)
app.command()(stats)
app.command()(locate)
app.command("suggest")(suggest_command)
runs.register(app)
app.command()(cache)


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="alias, hub id, folder or .gguf file")] = "smollm2-135m",
    n_edits: Annotated[int, typer.Option(min=1, help="how many of the shipped facts")] = 50,
    seed: Seed = 0,
    device: Device = "cpu",
    family: FamilyFile = None,
    as_json: AsJson = False,
) -> None:
    """Edit a real model with the facts that ship with fastedit, and show what changed and what did not."""
    console = open_console()
    with errors(console):
        check_device(device)
        from fastedit.cli.demo import run_demo

        data, text = run_demo(model, n_edits, seed, console, device, open_lines(console), families(family))
        emit(as_json, data, text)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this installation has, and fail when something is wrong with it."""
    from fastedit.cli.doctor import examine

    examination = examine()
    emit(as_json, examination.to_dict(), str(examination))
    if examination.problems:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the `fastedit` command."""
    # The name by which `python -m fastedit` would go otherwise is that of a file.
    app(prog_name="fastedit")
