"""--save and the options around it: judged before the work begins, carried out when it is done."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from fastedit.cli.console import refuse, say

if TYPE_CHECKING:
    from fastedit.editing.export import Format
    from fastedit.editor import Editor


def place_named(text: str) -> Path:
    """A place on the command line. An empty name, as of a variable that was never set, is not the current folder."""
    if not text:
        raise typer.BadParameter("a name is wanted, got an empty one")
    return Path(text)


Save = Annotated[Path | None, typer.Option(parser=place_named, metavar="PATH", help="folder for the edited model")]
SaveFormat = Annotated[
    Literal["checkpoint", "delta", "lora", "gguf"], typer.Option(help="what --save writes; see fastedit export --help")
]
SaveDtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="of what --save writes; default: the source's, float32 for a GGUF file"),
]
Force = Annotated[bool, typer.Option("--force", help="replace an earlier result that stands in the folder")]

UNUSED_WITHOUT_SAVE = {
    "save_format": "--save-format: is of what --save writes, and there is no --save",
    "save_dtype": "--save-dtype: is of what --save writes, and there is no --save",
    "force": "--force: lets --save replace an earlier result, and there is no --save",
}


@dataclass(frozen=True)
class Saving:
    """What is to be saved where; place None = nothing."""

    place: Path | None
    form: Format = "checkpoint"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    force: bool = False

    def check(self, model: str, typed: Collection[str] = ()) -> None:
        """Raise ValueError for options that cannot be followed: before a model is loaded.

        model: the source, which must stay; typed: the options on the command line"""
        from fastedit.editing.export import check_options
        from fastedit.model.load import resolve
        from fastedit.runtime.places import check_folder

        if self.place is None:
            return refuse(typed, UNUSED_WITHOUT_SAVE)

        check_options(self.form, None, self.dtype)
        check_folder(self.place, self.force, keep=[resolve(model)])

    def check_loaded(self, editor: Editor) -> None:
        """Raise ValueError for what the loaded model cannot be saved as, and for a disk that is too full for it."""
        from fastedit.editing.export import check_export

        if self.place is not None:
            check_export(editor.adapter, self.place, self.form, None, self.dtype, self.force)

    def save(self, console: Console, editor: Editor, data: dict[str, Any], lines: list[str]) -> Exception | None:
        """Save and tell it, on the console at once: what follows may fail.

        Returns the error that it ended with, to be raised when the results are printed."""
        if self.place is None:
            return None

        try:
            exported = editor.export(self.place, self.form, dtype=self.dtype, force=self.force)
        except (OSError, ValueError) as error:
            recorder = editor.recorder
            hint = "" if recorder is None else f"; `fastedit replay {recorder.log.folder} --save FOLDER` saves it again"
            return type(error)(f"{error}{hint}")

        data["saved"] = exported.to_dict()
        lines.append(str(exported))
        say(console, f"saved to {self.place}")
        return None
