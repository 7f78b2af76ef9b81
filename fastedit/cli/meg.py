"""What the command line does for `edit --method meg` and `eval --meg`: each result as data and as text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastedit.cli.console import refuse
from fastedit.cli.saving import UNUSED_WITHOUT_SAVE
from fastedit.config import changed, parse_changes
from fastedit.methods.meg.config import CONFIGS, MegConfig, method_name
from fastedit.methods.meg.editor import MeG
from fastedit.methods.meg.metrics import NAMES, SixMetrics
from fastedit.records.check import OnInvalid
from fastedit.records.edit import Edit, listing
from fastedit.runtime.places import check_file

# Options of `edit` that MeG does not use: name of the parameter -> why the option is refused.
UNUSED_BY_EDIT = {
    "preset": "--preset: meg has no presets, its settings are changed with --set",
    "batch_size": "--batch-size: meg learns all edits together, not in batches",
    "calibrate": "--calibrate: meg's settings need no check, they fit every model",
    "join": "--join: meg puts its template, the setting fit.template, between prompt and target",
    "moments": "--moments: meg needs no second moments, so no text for them",
    "moment_tokens": "--moment-tokens: meg needs no second moments",
    "on_error": "--on-error: meg has no batch that could fail; edits that could not be fitted are named in the result",
    "text": "--text: meg writes no weight, so the model's perplexity does not change",
    "fluency_prompts": "--fluency-prompts: meg measures its six numbers, and fluency is not among them",
    "watch": "--watch: meg learns all edits together, so there is no batch after which to measure",
    "resume": "--resume: the same command with --work-dir continues a meg run that was stopped",
    "run_dir": "--run-dir: a run directory records weights, and meg writes none; --work-dir keeps its stages",
    "canaries": "--canaries: the guard judges written weights, and meg writes none",
    "max_growth": "--max-growth: the guard judges written weights, and meg writes none",
    "save_format": "--save-format: meg has one form, its store",
    "save_dtype": "--save-dtype: a store of meg holds float32",
}

# The same for `eval --meg`.
UNUSED_BY_EVAL = {
    "unedited": "--unedited: with --meg MODEL itself is the unedited model",
    "join": "--join: meg puts its template, the setting fit.template, between prompt and target",
    "text": "--text: meg writes no weight, so the model's perplexity does not change",
    "fluency_prompts": "--fluency-prompts: --meg measures its six numbers, and fluency is not among them",
    "seed": "--seed: with --meg nothing is sampled",
}

# Options of `edit` that only MeG uses, for all other methods.
ONLY_FOR_MEG = {
    "others": "--others: only meg and meg-lookup learn from records that are not edited",
    "work_dir": "--work-dir: only meg and meg-lookup have stages to keep; --run-dir records the run of a method that"
    " writes weights",
}


def settings(method: str, assignments: Sequence[str]) -> MegConfig:
    """The method's own settings with these changes. Raises ValueError with all that is wrong with them."""
    return changed(CONFIGS[method_name(method)], parse_changes(assignments))


def check_save(save: Path | None, force: bool, typed: Collection[str]) -> Path | None:
    """The file that --save means: itself, or meg.safetensors in a folder. Raises PlaceError if it cannot go there.

    typed: the options on the command line; --force without --save is refused"""
    if save is None:
        refuse(typed, {"force": UNUSED_WITHOUT_SAVE["force"]})
        return None

    path = save if save.suffix == ".safetensors" else save / "meg.safetensors"
    check_file(path, force)
    return path


def edit(
    meg: MeG,
    edits: Sequence[Edit],
    others: Sequence[Edit],
    work_dir: Path | None,
    on_invalid: OnInvalid,
    evaluation: bool,
    save: Path | None,
    force: bool,
) -> tuple[dict[str, Any], str]:
    """Edit, save, measure; (data, text). save: the store's file; force: replace one that stands there"""
    run = meg.edit(edits, others, work_dir, on_invalid)
    data = {"method": meg.method, **run.to_dict()}

    total = sum(run.seconds.values())
    lines = [f"{len(run.edits)} edits, {total / len(run.edits):.2f} s per edit: {stage_line(run.seconds)}"]
    if run.failed:
        lines.append(f"{len(run.failed)} could not be fitted: case ids {', '.join(map(str, run.failed[:10]))}")
    if run.skipped:
        lines.append(f"left out:\n{listing(run.skipped)}")
    if not others:
        lines.append("no other records were given: the encoder is untrained and the gate's threshold a guess")

    if save is not None:
        meg.save(save, force)
        lines.append(f"saved to {save}")

    if evaluation:
        before, after = meg.measure()
        data["evaluation"] = {"unedited": before.to_dict(), "edited": after.to_dict()}
        lines.append(table(before, after))
    return data, "\n".join(lines)


def evaluate(meg: MeG, path: Path, edits: Sequence[Edit]) -> tuple[dict[str, Any], str]:
    """Measure a saved store on records; (data, text)."""
    meg.load(path)
    before, after = meg.measure(edits)
    return {"unedited": before.to_dict(), "edited": after.to_dict()}, table(before, after)


def stage_line(seconds: Mapping[str, float]) -> str:
    """Seconds per stage in one line."""
    return ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items())


def table(before: SixMetrics, after: SixMetrics) -> str:
    """The six numbers of the unedited and the edited model side by side, and the shares of prompts inside the gate."""
    lines = [f"{'metric, in percent':<21}{'unedited':>10}{'edited':>10}   ({after.n_records} records)"]
    old, new = before.to_dict(), after.to_dict()
    names = [f"{name}_{way}" for name in NAMES for way in ("free", "forced")]
    lines += [f"{name:<21}{_number(old[name]):>10}{_number(new[name]):>10}" for name in (*names, "score")]

    inside = ", ".join(f"{_number(share)} of {name} prompts" for name, share in after.accepted.items())
    return "\n".join([*lines, f"inside the gate: {inside}"])


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"
