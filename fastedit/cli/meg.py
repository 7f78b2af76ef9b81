"""What the command line does for `edit --method meg` and `eval --meg`: a text, and the same as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastedit.config import changed
from fastedit.methods.meg.config import CONFIGS
from fastedit.methods.meg.editor import MeG
from fastedit.methods.meg.metrics import NAMES, SixMetrics
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import Edit, listing

# Replaced when the branches meet.
UNUSED_BY_EDIT: dict[str, str] = {}
UNUSED_BY_EVAL: dict[str, str] = {}


def edit(
    model: ModelAdapter,
    method: str,
    edits: Sequence[Edit],
    others: Sequence[Edit],
    changes: Mapping[str, Any],
    seed: int,
    work_dir: Path | None,
    on_invalid: str,
    evaluation: bool,
    save: Path | None,
) -> tuple[dict[str, Any], str]:
    """Edit, measure, save; (data, text). save: the store's file, or a folder for meg.safetensors."""
    meg = MeG(model, method, changed(CONFIGS[method], changes), seed)
    run = meg.edit(edits, others, work_dir, on_invalid)
    data = {"method": method, **run.to_dict()}
    total = sum(run.seconds.values())
    lines = [f"{len(run.edits)} edits, {total / len(run.edits):.2f} s per edit: {stage_line(run.seconds)}"]
    if run.failed:
        lines.append(f"{len(run.failed)} could not be fitted: case ids {', '.join(map(str, run.failed[:10]))}")
    if run.skipped:
        lines.append(f"left out:\n{listing(run.skipped)}")
    if not others:
        lines.append("no other records were given: the encoder is untrained and the gate's threshold a guess")
    if evaluation:
        before, after = meg.measure()
        data["evaluation"] = {"unedited": before.to_dict(), "edited": after.to_dict()}
        lines.append(table(before, after))
    if save is not None:
        path = save / "meg.safetensors" if save.suffix != ".safetensors" else save
        meg.save(path)
        lines.append(f"saved to {path}")
    return data, "\n".join(lines)


def evaluate(model: ModelAdapter, path: Path, edits: Sequence[Edit]) -> tuple[dict[str, Any], str]:
    """Measure a saved store on records; (data, text)."""
    meg = MeG(model)
    meg.load(path)
    before, after = meg.measure(edits)
    return {"unedited": before.to_dict(), "edited": after.to_dict()}, table(before, after)


def stage_line(seconds: Mapping[str, float]) -> str:
    """Seconds per stage in one line."""
    return ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items())


def table(before: SixMetrics, after: SixMetrics) -> str:
    """The six numbers, unedited beside edited, and what the gate let in."""
    lines = [f"{'metric, in percent':<21}{'unedited':>10}{'edited':>10}   ({after.n_records} records)"]
    old, new = before.to_dict(), after.to_dict()
    names = [f"{name}_{way}" for name in NAMES for way in ("free", "forced")]
    lines += [f"{name:<21}{_number(old[name]):>10}{_number(new[name]):>10}" for name in (*names, "score")]
    inside = ", ".join(f"{_number(share)} of {name} prompts" for name, share in after.accepted.items())
    return "\n".join([*lines, f"inside the gate: {inside}"])


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"
