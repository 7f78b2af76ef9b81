"""One layer at a time against all layers held: the choice, what is told, the same bits, and what goes wrong."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastedit.config import changed
from fastedit.editor import Editor
from fastedit.methods.closed_form.holding import SolversOnDemand, all_fit, check_upper_copy
from fastedit.methods.closed_form.recipe import ClosedFormMethod
from fastedit.methods.closed_form.second_moments import BadMoments, StoredMoments, second_moments, stored_moments
from fastedit.methods.closed_form.solver import FactorFile, RidgeSolver
from fastedit.methods.registry import METHODS
from fastedit.model.adapter import ModelAdapter
from fastedit.model.background_text import Source
from fastedit.records.edit import EditSet
from fastedit.runtime.places import PlaceError
from tests.conftest import BATCH, CLOSED_FORM, TINY, TINY_CONFIG, TINY_CONFIGS

TOLD = "one layer at a time is read and solved"
KINDS = {
    "nse": ("nse", {}),
    "nse on selected neurons": ("nse", {"mass": 0.8}),
    "memit with memory": ("memit", {"memory": True}),
    "alphaedit": ("alphaedit", {}),
}


def scarce(name: str) -> ClosedFormMethod[Any]:
    """A method that finds no memory available."""
    shipped = METHODS[name]
    assert isinstance(shipped, ClosedFormMethod)
    return replace(shipped, name=f"{name}, no memory", available=lambda device: 0)


Make = Callable[..., Editor]


@pytest.fixture
def make(tiny_parts: tuple[Any, Any]) -> Make:
    """Makes editors on fresh copies of the tiny model that compute second moments from its held-out text."""

    def make(name: str, method: Any = None, moments: Any = None, **changes: Any) -> Editor:
        model, tokenizer = tiny_parts
        config = changed(TINY_CONFIGS[name], {**CLOSED_FORM, **changes})
        source = Source(TINY / "text.txt") if moments is None else moments
        adapter = ModelAdapter(copy.deepcopy(model), tokenizer)
        return Editor(adapter, method or name, config, moments=source, progress=False)

    return make


def bits(editor: Editor) -> tuple[str, dict[str, Tensor]]:
    return editor.weights.fingerprint(), {n: t.clone() for n, t in editor.state.tensors().items()}


def assert_same(left: tuple[str, dict[str, Tensor]], right: tuple[str, dict[str, Tensor]]) -> None:
    assert left[0] == right[0]
    assert left[1].keys() == right[1].keys()
    assert all(torch.equal(tensor, right[1][name]) for name, tensor in left[1].items())


@pytest.mark.parametrize("given", [False, True], ids=["from a text", "given"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_at_a_time_gives_the_same_bits(
    kind: str,
    given: bool,
    make: Make,
    tiny_moments: dict[int, Tensor],
    stream: EditSet,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two batches, undo, resume and replay."""
    name, changes = KINDS[kind]
    moments = tiny_moments if given else None
    edits = stream[: 2 * BATCH]

    held = make(name, moments=moments, **changes)
    held.edit(edits[:BATCH], BATCH)
    after_one = bits(held)
    held.edit(edits[BATCH:], BATCH)
    after_two = bits(held)
    assert isinstance(held.state.solvers, dict)
    assert TOLD not in caplog.text

    method = scarce(name)
    lean = make(name, method, moments, **changes)
    lean.edit(edits, BATCH, run_dir=tmp_path / "run")
    assert not isinstance(lean.state.moments, dict)
    assert isinstance(lean.state.solvers, SolversOnDemand)
    assert caplog.text.count(TOLD) == 1
    assert_same(bits(lean), after_two)
    assert lean.state.describe() == held.state.describe()

    lean.undo()
    assert_same(bits(lean), after_one)
    fresh = make(name, method, moments, **changes)
    fresh.edit(edits, BATCH, run_dir=tmp_path / "run", resume=True)
    assert_same(bits(fresh), after_one)
    later = Editor.resume(tmp_path / "run", make(name).adapter, method, moments, progress=False)
    later.edit(edits[BATCH:], BATCH)
    assert_same(bits(later), after_two)


def test_a_run_that_held_all_goes_on_with_one_layer_at_a_time(make: Make, stream: EditSet, tmp_path: Path) -> None:
    """What is held is no setting: a run may go on on a smaller machine."""
    whole = make("nse")
    whole.edit(stream, BATCH)
    first = make("nse")
    first.edit(stream[:BATCH], BATCH, run_dir=tmp_path / "run")

    second = make("nse")
    second.stream.method = replace(second.method, available=lambda device: 0)  # type: ignore[type-var]
    second.edit(stream, BATCH, run_dir=tmp_path / "run", resume=True)
    assert isinstance(second.state.solvers, SolversOnDemand)
    assert_same(bits(second), bits(whole))


def squares(d_ff: int) -> list[int]:
    """The tensors of a second moment's size that are alive."""
    found = [part for part in gc.get_objects() if isinstance(part, Tensor)]
    return [id(part) for part in found if part.shape == (d_ff, d_ff) and part.dtype in (torch.float32, torch.float64)]


@pytest.mark.parametrize("kind", KINDS)
def test_between_batches_nothing_of_that_size_stays_in_memory(kind: str, make: Make, stream: EditSet) -> None:
    name, changes = KINDS[kind]
    held, lean = make(name, **changes), make(name, scarce(name), **changes)
    before = len(squares(held.adapter.d_ff))
    lean.edit(stream[:BATCH], BATCH)
    gc.collect()
    assert len(squares(held.adapter.d_ff)) == before

    held.edit(stream[:BATCH], BATCH)
    gc.collect()
    n_layers = len(TINY_CONFIG.layers)
    assert len(squares(held.adapter.d_ff)) >= before + n_layers, "the count would see what is held"


def test_a_factor_is_computed_once_and_read_back_bit_for_bit(make: Make, stream: EditSet) -> None:
    held, lean = make("nse"), make("nse", scarce("nse"))
    for editor in (held, lean):
        editor.edit(stream[:BATCH], BATCH)

    for layer in TINY_CONFIG.layers:
        kept = lean.state.solvers[layer]
        assert isinstance(kept, RidgeSolver)
        assert kept.file is not None
        assert kept.file is lean.state.solvers[layer].file, "one file per layer, however often a solver is made"
        factor = kept.file.read()
        assert factor is not None
        assert torch.equal(factor, held.state.solvers[layer]._factor)
        assert factor.stride() == held.state.solvers[layer]._factor.stride()

    # The file answers, not a second Cholesky: one that was changed shows.
    factor = FactorFile()
    factor.keep(2 * torch.eye(192, dtype=torch.float64))
    solver = RidgeSolver(torch.eye(192), 1.0, factor)
    assert torch.equal(solver._lower_factor(), 2 * torch.eye(192, dtype=torch.float64))


def test_a_factor_that_finds_no_room_is_computed_again(
    make: Make,
    stream: EditSet,
    file_limit: Callable[[int], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    held, lean = make("nse"), make("nse", scarce("nse"))
    held.edit(stream[:BATCH], BATCH)
    lean.state.describe()
    with file_limit(100_000):
        lean.edit(stream[:BATCH], BATCH)
    assert caplog.text.count("a factor was not kept on the disk") == len(TINY_CONFIG.layers)
    assert_same(bits(lean), bits(held))


def test_an_editor_with_kept_factors_can_be_copied(make: Make, stream: EditSet) -> None:
    editor = make("nse", scarce("nse"))
    editor.edit(stream[:BATCH], BATCH)
    twin = copy.deepcopy(editor)
    for each in (editor, twin):
        each.edit(stream[BATCH : 2 * BATCH], BATCH)
    assert_same(bits(editor), bits(twin))


def test_what_fits_is_judged_by_all_that_is_held_and_needed(
    tiny_model: ModelAdapter, caplog: pytest.LogCaptureFixture
) -> None:
    layers, d_ff, d_model = (2, 3, 4), 192, 64
    needed = 3 * 12 * d_ff**2 + 16 * d_ff**2 + 3 * d_ff * d_model * (8 + 4)
    assert all_fit(tiny_model, layers, lambda device: needed)
    assert all_fit(tiny_model, layers, lambda device: None)
    assert not caplog.text
    assert not all_fit(tiny_model, layers, lambda device: needed - 1)
    assert "second moments and solvers of 3 layers take 0.0 GB" in caplog.text


def test_the_check_asks_for_the_device_of_the_systems(tiny_model: ModelAdapter) -> None:
    asked: list[torch.device] = []
    all_fit(tiny_model, (2,), lambda device: asked.append(device))
    assert asked == [torch.device("cpu")]


@pytest.mark.parametrize(("together", "passes"), [(0, 3), (1, 3), (2, 2), (3, 1), (9, 1)], ids=lambda n: str(n))
def test_moments_summed_in_several_passes_are_the_same(
    together: int, passes: int, tiny_model: ModelAdapter, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, config = Source(TINY / "text.txt"), TINY_CONFIG.moments
    at_once = second_moments(tiny_model, (2, 3, 4), source, config, tmp_path / "once", show=False)
    beside = 6 * 192**2 + config.token_budget * (24 * 192 + 32 * 64)
    room = beside + together * 4 * 192**2

    runs: list[int] = []
    hook = tiny_model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    found = second_moments(tiny_model, (2, 3, 4), source, config, tmp_path / "parts", False, lambda device: room)
    hook.remove()
    assert all(torch.equal(found[layer], moment) for layer, moment in at_once.items())
    told = f"second moments of 3 layers are summed in {passes} passes"
    assert (told in caplog.text) is (passes > 1)

    stored = stored_moments(tiny_model, (2, 3, 4), source, config, tmp_path / "parts", show=False)
    assert all(torch.equal(stored[layer], moment) for layer, moment in at_once.items())
    assert list(stored) == [2, 3, 4]
    assert len(stored) == 3


def test_without_a_cache_one_layer_at_a_time_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: EditSet
) -> None:
    """There is no other place for the moments; a file in place of the folder fails for every user, root too."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTEDIT_CACHE", str(tmp_path / "file"))
    editor = make("nse", scarce("nse"))
    before = editor.weights.fingerprint()
    with pytest.raises(PlaceError, match=r"file/moments.*FASTEDIT_CACHE"):
        editor.edit(stream[:BATCH], BATCH)
    assert editor.weights.fingerprint() == before


def test_a_file_that_is_damaged_meanwhile_is_told_and_nothing_written(make: Make, stream: EditSet) -> None:
    editor = make("nse", scarce("nse"))
    moments = editor.state.moments
    assert isinstance(moments, StoredMoments)
    before = bits(editor)

    path = moments.paths[TINY_CONFIG.layers[-1]]
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadMoments, match="checksum"):
        editor.edit(stream[:BATCH], BATCH)
    assert_same(bits(editor), before)

    path.unlink()
    with pytest.raises(BadMoments, match="not a readable file"):
        editor.edit(stream[:BATCH], BATCH)


def test_a_missing_layer_is_told_where_moments_are_given(
    make: Make, tiny_moments: dict[int, Tensor], stream: EditSet
) -> None:
    some = {layer: moment for layer, moment in tiny_moments.items() if layer != 3}
    with pytest.raises(ValueError, match=r"layers \[3\] are missing, got \[2, 4\]"):
        make("nse", scarce("nse"), some).edit(stream[:BATCH], BATCH)


def test_given_moments_may_be_read_on_demand(make: Make, tiny_moments: dict[int, Tensor], stream: EditSet) -> None:
    """A mapping of the caller's own is asked for one layer after the other, and never for all."""

    asked: list[int] = []

    class Counted(dict[int, Tensor]):
        def __getitem__(self, layer: int) -> Tensor:
            asked.append(layer)
            return super().__getitem__(layer)

    moments = Counted(tiny_moments)
    editor = make("nse", scarce("nse"), moments, residual_min=0.0)
    _ = editor.state
    assert asked == [2, 3, 4]
    run = editor.edit(stream[:BATCH], BATCH)
    assert run.batches[0].written == (BATCH, BATCH)
    assert asked == [2, 3, 4] * (1 + 2)


@pytest.fixture
def half_editor(tiny_parts: tuple[Any, Any], tiny_moments: dict[int, Tensor]) -> Editor:
    """A float16 model, of which a CPU makes a float32 copy above the value layer, and no memory for one."""
    model, tokenizer = tiny_parts
    adapter = ModelAdapter(copy.deepcopy(model).half(), tokenizer)
    return Editor(adapter, scarce("nse"), TINY_CONFIG, moments=tiny_moments, progress=False)


def test_a_copy_of_the_upper_layers_that_does_not_fit_is_refused(half_editor: Editor, stream: EditSet) -> None:
    with pytest.raises(ValueError, match=r"value.dtype: a copy of the layers above layer 4 in 32 bits takes"):
        half_editor.edit(stream[:BATCH], BATCH)
    assert not half_editor.edits

    half_editor.config = changed(half_editor.config, {"value": {"dtype": "model", "steps": 2}})
    half_editor.edit(stream[:BATCH], BATCH)


def test_a_model_in_bfloat16_needs_no_copy(tiny_parts: tuple[Any, Any], tiny_moments: dict[int, Tensor]) -> None:
    model, tokenizer = tiny_parts
    adapter = ModelAdapter(copy.deepcopy(model).bfloat16(), tokenizer)
    editor = Editor(adapter, scarce("nse"), TINY_CONFIG, moments=tiny_moments, progress=False)
    assert editor.state.upper is adapter


def test_the_copy_is_counted_by_its_own_weights(tiny_model: ModelAdapter) -> None:
    parts = [*tiny_model.layers[5:], tiny_model.model.get_output_embeddings()]
    size = 2 * sum(parameter.numel() for part in parts for parameter in part.parameters())
    check_upper_copy(tiny_model, 5, 2, lambda device: size)
    check_upper_copy(tiny_model, 5, 2, lambda device: None)
    with pytest.raises(ValueError, match="above layer 4 in 16 bits"):
        check_upper_copy(tiny_model, 5, 2, lambda device: size - 1)


def test_a_jittered_factor_is_the_one_of_before(caplog: pytest.LogCaptureFixture) -> None:
    """The matrix that was overwritten by a failed attempt is made anew."""
    half = torch.randn(64, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = half @ half.T - 1e-11 * torch.eye(64, dtype=torch.float64)
    # Only the lower triangle is read.
    moment[3, 5] += 1e-3
    system = 7.0 * moment.double()
    with caplog.at_level(logging.WARNING):
        factor = RidgeSolver(moment, 7.0)._lower_factor()
    for jitter in (0.0, 1e-12, 1e-10, 1e-8):
        shifted = system.clone()
        if jitter:
            shifted.diagonal().add_(jitter * float(system.diagonal().mean()))
        expected, info = torch.linalg.cholesky_ex(shifted)
        pivots = expected.diagonal()
        if int(info) == 0 and float((pivots.max() / pivots.min()) ** 2) < 1 / torch.finfo(torch.float64).eps:
            break
    assert jitter > 0
    assert "jitter" in caplog.text
    assert torch.equal(factor, expected)
