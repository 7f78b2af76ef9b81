"""Run directories written by earlier versions resume, undo, export and continue as they always did.

written_by_0.1.0/ holds run directories of every method, and in expected.json what version 0.1.0 made of them. A result
must have the same bits where the arithmetic is that of the machine which wrote them. Elsewhere its numbers must agree
within TOLERANCE. Methods that write columns store the columns, so what they replay has the same bits on every machine.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastedit.editor import Editor
from fastedit.methods.registry import METHODS
from fastedit.model.adapter import ModelAdapter
from fastedit.records.edit import EditSet
from fastedit.runs.log import RunLog

OLDER = Path(__file__).resolve().parent / "written_by_0.1.0"
EXPECTED = json.loads((OLDER / "expected.json").read_text())
RUNS: dict[str, dict[str, Any]] = EXPECTED["runs"]
FINISHED = [name for name, about in RUNS.items() if "continued" in about["states"]]
UNFINISHED = [name for name, about in RUNS.items() if "finished" in about["states"]]
BY_COLUMN = {name for name, method in METHODS.items() if method.by_column}

WEIGHT = "model.layers.{}.mlp.down_proj.weight"
D_MODEL = 64
N_SAMPLED = 16
# Of an entry, in units of the rms of its weight's delta; of a norm, in units of itself. Ten times what other
# instruction sets, without FMA too, and plain torch without the kernels were seen to change.
TOLERANCE = 1e-4
# Of the norm, where bfloat16 weights are computed anew: single entries move by whole roundings.
BFLOAT16_TOLERANCE = 1e-3

State = dict[str, Any]
Resume = Callable[[str], Editor]


def arithmetic() -> dict[str, Any]:
    """What decides the bits of results besides the code: libraries, instruction sets, threads, and the bits of a few
    products, exponentials, factorisations and gradients. That these agree is taken for the same arithmetic."""
    return {
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels(),
        "samples": samples(),
    }


def kernels() -> str:
    """The instruction set of the C++ kernels, as far as they are used."""
    try:
        module = importlib.import_module("fastedit._cpu")
    except ImportError:
        return "none"
    wish = os.environ.get("FASTEDIT_ISA") or module.ISAS[module.best_isa()]
    return f"{os.environ.get('FASTEDIT_BACKEND', '')} {wish}".strip()


def samples() -> str:
    """Hash over operations of torch alone, at the sizes of the tiny model."""
    x = (torch.arange(24 * 64) * 37 % 101 / 101 - 0.5).view(24, 64).requires_grad_()
    w = (torch.arange(64 * 192) * 53 % 211 / 211 - 0.5).view(192, 64)

    hidden = torch.nn.functional.silu(x @ w.T)
    loss = torch.nn.functional.rms_norm(hidden @ w, (64,)).log_softmax(-1).square().mean()
    (gradient,) = torch.autograd.grad(loss, x)

    gram = w.double().T @ w.double() + torch.eye(64, dtype=torch.float64)
    solved = torch.cholesky_solve(x.detach().double().T, torch.linalg.cholesky(gram))
    left, sizes, right = torch.linalg.svd(solved, full_matrices=False)
    half = x.detach().bfloat16() @ w.T.bfloat16()

    results = (hidden.detach(), gradient, solved, solved.float() @ x.detach(), left, sizes, right, half)
    return digest(b"".join(bits(tensor) for tensor in results))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@cache
def is_same_machine() -> bool:
    return arithmetic() == EXPECTED["machine"]


@pytest.fixture
def resume(tiny_parts: tuple[Any, Any], older_moments: dict[int, torch.Tensor], tmp_path: Path) -> Resume:
    """Makes an editor of a copy of a run, on a fresh tiny model; a second call opens the same copy again."""

    def make(name: str) -> Editor:
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(OLDER / name, folder)

        model = copy.deepcopy(tiny_parts[0]).to(getattr(torch, RUNS[name]["dtype"]))
        options = {} if RUNS[name]["method"] in BY_COLUMN else {"moments": older_moments}
        return Editor.resume(folder, ModelAdapter(model, tiny_parts[1]), progress=False, **options)

    return make


@pytest.fixture
def state(tiny_parts: tuple[Any, Any]) -> Callable[[Editor], State]:
    """Tells what an editor's model is: see `measured`."""

    def tell(editor: Editor) -> State:
        model = editor.model
        unedited = copy.deepcopy(tiny_parts[0]).to(model.dtype)
        return {"live": [edit.case_id for edit in editor.edits], "weights": measured(model, unedited)}

    return tell


def measured(model: torch.nn.Module, unedited: torch.nn.Module) -> dict[str, list[Any]]:
    """layer -> of its down-projection, when it differs from the unedited one: hash of its bytes, norm of its delta,
    number of changed columns, and sampled entries of the delta. Of other changed parameters: name -> hash."""
    layers = {WEIGHT.format(layer): str(layer) for layer in range(model.config.num_hidden_layers)}
    originals = dict(unedited.named_parameters())

    changed = {}
    for name, weight in model.named_parameters():
        if bits(weight) == bits(originals[name]):
            continue

        if name not in layers:
            changed[name] = [digest(bits(weight))]
            continue

        delta = weight.detach().double() - originals[name].double()
        changed[layers[name]] = [
            digest(bits(weight)),
            float(delta.norm()),
            len(changed_columns(delta)),
            entries(delta, changed_columns(delta)),
        ]
    return changed


def changed_columns(delta: torch.Tensor) -> torch.Tensor:
    return delta.any(0).nonzero().flatten()


def entries(delta: torch.Tensor, columns: torch.Tensor) -> list[float]:
    """N_SAMPLED entries, one in each of as many rows, in columns spread over those that changed."""
    rows = torch.arange(N_SAMPLED) * delta.shape[0] // N_SAMPLED
    sampled = columns[torch.linspace(0, len(columns) - 1, N_SAMPLED).long()]
    return [float(f"{value:.7g}") for value in delta[rows, sampled].tolist()]


def differences(now: State, was: State, same_bits: bool, rounds_entries: bool = False) -> list[str]:
    """What differs. rounds_entries: single entries may, norms within BFLOAT16_TOLERANCE may not."""
    wrong = [] if now["live"] == was["live"] else [f"edits {now['live']}, were {was['live']}"]
    if now["weights"].keys() != was["weights"].keys():
        return [*wrong, f"changed weights {sorted(now['weights'])}, were {sorted(was['weights'])}"]

    for layer, (sha256, norm, n_columns, sampled) in was["weights"].items():
        sha256_now, norm_now, n_columns_now, sampled_now = now["weights"][layer]
        if same_bits and sha256_now != sha256:
            wrong.append(f"layer {layer}: other bits")

        if not abs(norm_now / norm - 1) <= (BFLOAT16_TOLERANCE if rounds_entries else TOLERANCE):
            wrong.append(f"layer {layer}: norm {norm_now}, was {norm}")
        if rounds_entries:
            continue

        if n_columns_now != n_columns:
            wrong.append(f"layer {layer}: {n_columns_now} changed columns, were {n_columns}")
        elif not furthest(sampled_now, sampled, norm, n_columns) <= TOLERANCE:
            wrong.append(f"layer {layer}: entries {sampled_now}, were {sampled}")
    return wrong


def furthest(now: list[float], was: list[float], norm: float, n_columns: int) -> float:
    """The largest difference of entries, in units of the rms of the delta's changed columns."""
    rms = norm / (D_MODEL * n_columns) ** 0.5
    # Of a tensor, whose max is NaN when one of its entries is.
    return float((torch.tensor(now) - torch.tensor(was)).abs().max()) / rms


def check(name: str, part: str, now: State) -> None:
    """The state must be the recorded one. part: what was done to the run"""
    about = RUNS[name]
    is_replayed = part in ("resumed", "undone", "undone_to_1")
    same_bits = is_same_machine() or (is_replayed and about["method"] in BY_COLUMN)
    rounds_entries = about["dtype"] == "bfloat16" and not is_replayed
    assert differences(now, about["states"][part], same_bits, rounds_entries) == []


@pytest.mark.parametrize("name", RUNS)
def test_resumes(name: str, resume: Resume, state: Callable[[Editor], State]) -> None:
    check(name, "resumed", state(resume(name)))


@pytest.mark.parametrize("name", RUNS)
def test_undoes_the_last_batch(name: str, resume: Resume, state: Callable[[Editor], State]) -> None:
    editor = resume(name)
    editor.undo(last=1)
    check(name, "undone", state(editor))
    assert state(resume(name)) == state(editor)


@pytest.mark.parametrize("name", RUNS)
def test_undoes_all_batches_but_one_and_all(name: str, resume: Resume, state: Callable[[Editor], State]) -> None:
    editor = resume(name)
    editor.undo(to=1)
    check(name, "undone_to_1", state(editor))

    editor.undo(to=0)
    assert state(editor) == {"live": [], "weights": {}}


@pytest.mark.parametrize("name", RUNS)
def test_forgets_one_edit(name: str, resume: Resume, state: Callable[[Editor], State]) -> None:
    editor = resume(name)
    editor.forget(RUNS[name]["forgets"])
    check(name, "forgotten", state(editor))
    assert state(resume(name)) == state(editor)


@pytest.mark.parametrize("name", FINISHED)
def test_continues_with_other_edits(
    name: str, resume: Resume, state: Callable[[Editor], State], tiny_facts: EditSet
) -> None:
    editor = resume(name)
    editor.edit(tiny_facts[20:22], 2)
    check(name, "continued", state(editor))


@pytest.mark.parametrize("name", UNFINISHED)
def test_finishes_a_stopped_stream(
    name: str, resume: Resume, state: Callable[[Editor], State], tiny_facts: EditSet
) -> None:
    editor = resume(name)
    edits = tiny_facts[: RUNS[name]["stream"]]
    run = editor.edit(edits, RUNS[name]["batch_size"], resume=True)
    assert len(run.edits) == len(edits)
    check(name, "finished", state(editor))


@pytest.mark.parametrize("form", ["delta", "lora"])
@pytest.mark.parametrize("name", RUNS)
def test_exports(name: str, form: str, resume: Resume, state: Callable[[Editor], State], tmp_path: Path) -> None:
    editor = resume(name)
    before = state(editor)
    exported = editor.export(tmp_path / form, form)
    assert state(editor) == before

    was = RUNS[name]["exports"][form]
    tensors = load_file(tmp_path / form / was["files"][-1 if form == "lora" else 0])
    assert sorted(path.name for path in (tmp_path / form).iterdir()) == was["files"]
    assert [list(tensor.shape) for _, tensor in sorted(tensors.items())] == was["shapes"]
    assert {str(layer): rank for layer, rank in exported.rank.items()} == was["rank"]
    for layer, error in exported.error.items():
        assert error == pytest.approx(was["error"][str(layer)], rel=0.1)

    if form == "lora":
        config = json.loads((tmp_path / form / "adapter_config.json").read_text())
        # 0.1.0 named no base for a model from memory, although the model knew where it came from.
        assert config.pop("base_model_name_or_path") == editor.model.config._name_or_path
        assert config == {name: value for name, value in was["config"].items() if name in config}
        assert was["config"].keys() - config.keys() == {"base_model_name_or_path"}
    if is_same_machine():
        hashes = {key: hashlib.sha256(bits(tensor)).hexdigest() for key, tensor in tensors.items()}
        assert digest(json.dumps(hashes, sort_keys=True).encode()) == was["sha256"]
        assert exported.holds is not None
        n_edits, *held = exported.holds
        assert [count / n_edits for count in held] == was["holds"]
    assert_factors_make_the_delta(tensors, RUNS[name])


def assert_factors_make_the_delta(tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
    """The product of the factors is the delta of the resumed weights, on every machine."""
    for layer, (_, norm, n_columns, sampled) in about["states"]["resumed"]["weights"].items():
        product = factors_product(tensors, layer).double()
        # The deltas are those of the float32 masters, which the model's weights round.
        if about["dtype"] == "bfloat16":
            assert float(product.norm()) == pytest.approx(norm, rel=1e-2)
        else:
            columns = changed_columns(product)
            assert furthest(entries(product, columns), sampled, norm, n_columns) < TOLERANCE


def factors_product(tensors: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """W - W_0, (d_model, d_ff), as an exported file holds it."""
    weight = WEIGHT.format(layer)
    if f"{weight}/delta" in tensors:
        return tensors[f"{weight}/delta"]
    if f"{weight}/left" in tensors:
        return tensors[f"{weight}/left"] @ tensors[f"{weight}/right"]

    module = f"base_model.model.{weight.removesuffix('.weight')}"
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


@pytest.mark.parametrize("name", RUNS)
def test_the_runs_are_what_was_written(name: str) -> None:
    """The files came through git byte for byte, and from the machine that `is_same_machine` compares with."""
    log = RunLog(OLDER / name)
    log.verify()
    assert log.format == 1

    header = log.records[0].body
    assert "format" not in header
    assert all(header["machine"][part] == EXPECTED["machine"][part] for part in ("torch", "transformers", "threads"))


def test_bits_are_compared() -> None:
    now = arithmetic()
    # One that changed from call to call would never compare bits, on any machine.
    assert arithmetic() == now

    other = [part for part, was in EXPECTED["machine"].items() if now[part] != was]
    assert is_same_machine() == (not other)
    if other:
        pytest.skip(f"numbers are compared, not bits: other {', '.join(other)}")


def test_wrong_results_are_seen(resume: Resume, state: Callable[[Editor], State]) -> None:
    editor = resume("nse")
    was = state(editor)
    weight = editor.adapter.down_parameter(3).data

    # One bit of one entry.
    weight.view(torch.int32)[5, 7] ^= 1
    assert differences(state(editor), was, same_bits=True) == ["layer 3: other bits"]
    assert differences(state(editor), was, same_bits=False) == []
    weight.view(torch.int32)[5, 7] ^= 1
    assert differences(state(editor), was, same_bits=True) == []

    # Another weight altogether.
    editor.model.model.norm.weight.data[0] += 1
    assert "changed weights" in differences(state(editor), was, same_bits=False)[0]


def test_an_entry_past_the_tolerance_is_seen() -> None:
    was = RUNS["nse"]["states"]["resumed"]
    _, norm, n_columns, _ = was["weights"]["3"]
    rms = norm / (D_MODEL * n_columns) ** 0.5

    for share, is_seen in ((0.5, False), (2, True), (float("nan"), True)):
        now = copy.deepcopy(was)
        now["weights"]["3"][3][8] += share * TOLERANCE * rms
        assert bool(differences(now, was, same_bits=False)) == is_seen

        now = copy.deepcopy(was)
        now["weights"]["3"][1] *= 1 + share * TOLERANCE
        assert bool(differences(now, was, same_bits=False)) == is_seen


@pytest.mark.parametrize(("place", "value"), [("live", [0, 1]), ("weights", {}), ("columns", 191), ("norm", 1.01)])
def test_other_edits_layers_and_columns_are_seen(place: str, value: Any) -> None:
    was = RUNS["nse-bfloat16"]["states"]["continued"]
    now = copy.deepcopy(was)
    if place == "columns":
        now["weights"]["3"][2] = value
    elif place == "norm":
        now["weights"]["3"][1] *= value
    else:
        now[place] = value

    assert differences(now, was, same_bits=False)
    assert bool(differences(now, was, same_bits=False, rounds_entries=True)) == (place != "columns")
