"""Commands that deal with run directories: log, diff, undo, replay, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from fastedit.cli.console import AsJson, emit, errors, given, open_console, open_lines, refuse, stage
from fastedit.cli.inputs import check_device, open_model
from fastedit.cli.options import Device
from fastedit.cli.saving import Force, SaveDtype, place_named
from fastedit.runtime.words import counted

if TYPE_CHECKING:
    from fastedit.editor import Editor
    from fastedit.model.adapter import ModelAdapter
    from fastedit.records.edit import CaseId
    from fastedit.runs.log import Record
    from fastedit.runs.recorder import Recorder
    from fastedit.runtime.progress import Lines
    from fastedit.weights.editable import EditableWeights

RunDir = Annotated[Path, typer.Argument(help="run directory, as given to edit --run-dir")]
To = Annotated[int | None, typer.Option("--to", min=0, help="only the first so many batches, before a damaged one")]
Onto = Annotated[str | None, typer.Option("--onto", help="the unedited model; default: where it was loaded from")]

# Options of `undo` that only --edit uses: whole batches are taken back in the log alone.
UNUSED_WITHOUT_A_MODEL = {
    "onto": "--onto: only undo --edit loads the model",
    "device": "--device: only undo --edit loads the model",
}


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (log, diff, undo, replay, export):
        app.command()(command)


def log(
    run_dir: RunDir,
    verify: Annotated[bool, typer.Option("--verify", help="check every byte of every file")] = False,
    as_json: AsJson = False,
) -> None:
    """List what was recorded, and what of it is in force. Of a damaged run, what can be read; then the damage."""
    with errors(open_console()):
        from fastedit.runs.log import DamagedRun
        from fastedit.runs.recorder import Recorder

        recorder = Recorder.open(run_dir, up_to_damage=True)
        damaged = recorder.log.damaged() if verify else {}
        live = {record.number for record in recorder.live}
        rows = [
            {"record": r.number, "time": r.body["time"], "kind": r.kind, "in_force": r.number in live, **_about(r)}
            | ({"damage": str(damaged[r.number])} if r.number in damaged else {})
            for r in recorder.log.records
        ]
        n_edits = sum(len(record.body["edits"]) for record in recorder.live)
        text = [
            f"{r['record']:>6}  {r['time']}  {'*' if r['in_force'] else ' '} {r['kind']:<9} {r['what']}" for r in rows
        ]
        batches, edits = counted(len(live), "batch", "batches"), counted(n_edits, "edit", "edits")
        text.append(f"in force (*): {batches} with {edits}")
        data = {"records": rows, "batches": len(live), "edits": n_edits, "made_with": dict(recorder.header["machine"])}
        wrong = [str(error) for error in (*damaged.values(), recorder.log.damage) if error is not None]
        emit(as_json, data | ({"damage": wrong} if wrong else {}), "\n".join(text))

        if wrong:
            raise DamagedRun("\n".join(wrong))


def _about(record: Record) -> dict[str, Any]:
    body = record.body
    if record.kind == "batch":
        report = body["report"]
        notes = "".join(f"; {note}" for note in report["notes"])
        ids = [edit["case_id"] for edit in body["edits"]]
        # A method that optimises nothing has no loss; NaN stands there as text.
        loss = "" if report["loss"] is None else f", loss {float(report['loss']):.3g}"
        made_with = ", ".join(f"{name} {value}" for name, value in body.get("made_with", {}).items())
        notes += made_with and f"; made with {made_with}"
        what = f"{counted(len(ids), 'edit', 'edits')} ({_short(ids)}){loss}, {report['seconds']:.1f} s{notes}"
        return {"what": what, "case_ids": ids, "report": report, "bytes": record.size}
    if record.kind == "rewind":
        then = f", then records {_short(body['then'])}" if body["then"] else ""
        return {"what": f"the first {body['keep']} stay{then}"}
    whats = {
        "run": lambda: (
            f"{body['settings']['method']} on {body['model']['source'] or 'a loaded model'}, made with"
            f" {', '.join(f'{name} {value}' for name, value in body['machine'].items())}"
        ),
        "stream": lambda: f"{counted(body['n_batches'], 'batch', 'batches')}, on error {body['on_error']}",
        "rejected": lambda: f"batch {body['batch']}: {body['report']['error']}",
        "outcome": lambda: (
            f"{body['n_edits'] - len(body['missed'])} of {counted(body['n_edits'], 'edit', 'edits')} took"
        ),
        "snapshot": lambda: f"after {counted(body['live'], 'batch', 'batches')}",
    }
    return {"what": whats[record.kind]()}


def _short(items: list[Any]) -> str:
    return ", ".join(map(str, items[:3])) + (f", ... {items[-1]}" if len(items) > 3 else "")


def diff(run_dir: RunDir, to: To = None, onto: Onto = None, device: Device = "cpu", as_json: AsJson = False) -> None:
    """Say what the edits in force changed: per layer the norm of the change, and the neurons it touches."""
    with errors(open_console()):
        from fastedit.editing.recorded import recorded_weights
        from fastedit.runs.recorder import Recorder

        check_device(device)
        recorder = Recorder.open(run_dir, to)
        model = _model(recorder, onto, device, open_lines(Console(stderr=True)))
        weights = recorded_weights(recorder, model)
        layers: dict[int, dict[str, Any]] = {}
        lines = [f"{'layer':>5}  {'|change|':>9}  {'share':>7}  {'neurons':>8}  most changed"]
        for layer in weights.layers:
            layers[layer] = _change(weights, layer)
            lines.append(_change_line(layer, layers[layer]))

        n_edits = sum(len(record.body["edits"]) for record in recorder.live)
        emit(as_json, {"layers": layers, "edits": n_edits}, "\n".join(lines))


def _change(weights: EditableWeights, layer: int) -> dict[str, Any]:
    """How the edits in force changed one layer, as plain data."""
    from fastedit.editing.export import delta

    change = delta(weights, layer)
    columns = change.norm(dim=0)
    return {
        "norm": float(change.norm()),
        "share": float(change.norm()) / float(weights.original(layer).double().norm()),
        "neurons": int((columns > 0).sum()),
        "d_ff": len(columns),
        "most_changed": columns.argsort(descending=True)[:5].tolist(),
    }


def _change_line(layer: int, change: dict[str, Any]) -> str:
    touched = f"{change['neurons']}/{change['d_ff']}"
    most = _short(change["most_changed"])
    return f"{layer:>5}  {change['norm']:>9.4f}  {change['share']:>7.2%}  {touched:>8}  {most}"


def undo(
    context: typer.Context,
    run_dir: RunDir,
    last: Annotated[int | None, typer.Option(min=1, help="take the last batches back")] = None,
    to: Annotated[int | None, typer.Option(min=0, help="keep so many batches, from the first on")] = None,
    case: Annotated[str | None, typer.Option("--edit", help="take one edit back, by its case id")] = None,
    onto: Onto = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Take batches of a run back, exactly, or one edit, by solving the batches from its own on again without it."""
    with errors(open_console()):
        if sum(choice is not None for choice in (last, to, case)) != 1:
            raise ValueError("undo: say one of --last N, --to BATCH, --edit CASE_ID")
        if case is None:
            refuse(given(context), UNUSED_WITHOUT_A_MODEL)
        if case is not None:
            editor = _editor(run_dir, onto, device)
            forgotten = editor.forget(_case_id(editor, case))
            emit(as_json, forgotten.to_dict(), str(forgotten))
            return
        from fastedit.runs.recorder import Recorder

        recorder = Recorder.open(run_dir, up_to_damage=to is not None)
        count = len(recorder.live)
        keep = count - last if last is not None else to or 0
        # What is damaged is set aside even if no batch before it is taken back.
        most = count if recorder.log.damage is not None else count - 1
        if not 0 <= keep <= most:
            asked = f"keep {to}" if last is None else f"take {last} back"
            raise ValueError(f"undo: {counted(count, 'batch is', 'batches are')} in force, asked to {asked}")
        recorder.verify(keep)
        with recorder.log.writing(rescue=to is not None):
            recorder.rewind(keep)
        text = f"{counted(count - keep, 'batch', 'batches')} taken back, {keep} left"
        emit(as_json, {"batches": keep, "taken_back": count - keep}, text)


def _case_id(editor: Editor, text: str) -> CaseId:
    """The case id that is written like this: 7 and "7" never stand for two edits."""
    return next((edit.case_id for edit in editor.edits if str(edit.case_id) == text), text)


def replay(
    run_dir: RunDir,
    save: Annotated[Path, typer.Option(parser=place_named, metavar="PATH", help="folder for the edited model")],
    save_dtype: SaveDtype = None,
    force: Force = False,
    to: To = None,
    onto: Onto = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Write the edits in force into the unedited model once more, and save it."""
    with errors(open_console()):
        _check_place(run_dir, onto, save, force)
        editor = _editor(run_dir, onto, device, to)
        exported = editor.save_pretrained(save, save_dtype, force)

        n_edits = len(editor.edits)
        data = {"edits": n_edits, **exported.to_dict()}
        emit(as_json, data, f"{counted(n_edits, 'edit', 'edits')} written, {exported}")


def export(
    run_dir: RunDir,
    folder: Annotated[Path, typer.Argument(parser=place_named, metavar="PATH", help="absent or empty")],
    form: Annotated[
        Literal["checkpoint", "delta", "lora", "gguf"],
        typer.Option("--format", help="who is to read it; gguf: the GGUF file of the source, with the edits in it"),
    ] = "checkpoint",
    rank: Annotated[int | None, typer.Option(min=1, help="of delta and lora; default: exact")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="of a checkpoint's weights, default: the source's; of the edited tensors in a GGUF file"),
    ] = None,
    force: Force = False,
    to: To = None,
    onto: Onto = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Write the edits in force in a form that others read."""
    with errors(open_console()):
        from fastedit.editing.export import check_options

        check_options(form, rank, dtype)
        _check_place(run_dir, onto, folder, force)
        exported = _editor(run_dir, onto, device, to).export(folder, form, rank, dtype, force)
        emit(as_json, exported.to_dict(), str(exported))


def _check_place(run_dir: Path, onto: str | None, folder: Path, force: bool) -> None:
    """Raise PlaceError if a result cannot go to a folder: before a model is loaded. The source and the run stay."""
    from fastedit.model.load import resolve
    from fastedit.runs.recorder import Recorder
    from fastedit.runtime.places import check_folder

    source = onto or Recorder.open(run_dir, up_to_damage=True, quiet=True).header["model"]["source"]
    check_folder(folder, force, keep=[run_dir, *([] if source is None else [resolve(source)])])


def _editor(run_dir: Path, onto: str | None, device: str, to: int | None = None) -> Editor:
    """The editor of a run. onto: the unedited model, None = where it was loaded from; device: for the model"""
    from fastedit.editor import Editor
    from fastedit.runs.recorder import Recorder

    check_device(device)
    lines = open_lines(Console(stderr=True))
    model = _model(Recorder.open(run_dir, to, quiet=True), onto, device, lines)
    return Editor.resume(run_dir, model, progress=lines, to=to)


def _model(recorder: Recorder, onto: str | None, device: str, lines: Lines | None) -> ModelAdapter:
    """The unedited model of a run. onto: None = from where it was loaded"""
    about = recorder.header["model"]
    if onto is not None:
        return open_model(onto, about["dtype"], device, lines, recorder.families)

    stage(lines, f"loading {about['source']}")
    return recorder.load_model(device)
