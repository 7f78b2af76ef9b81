"""The op benchmarks' arithmetic: a wrong byte count, baseline, gate or row would not show in a table of numbers."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastedit.ops import _dispatch
from fastedit.ops.gram_update import gram_update_torch
from fastedit.testing import Case

ROOT = Path(__file__).resolve().parents[2]
OPS = sorted(path.stem for path in (ROOT / "fastedit/ops").glob("[a-z]*.py") if (ROOT / f"bench/{path.name}").is_file())


@pytest.fixture(scope="module")
def bench():
    """Imports modules of bench/ by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        yield importlib.import_module


@pytest.fixture
def run(bench, monkeypatch):
    monkeypatch.delenv("FASTEDIT_BACKEND", raising=False)
    return bench("run")


@pytest.fixture
def timing(bench, monkeypatch, tmp_path):
    """bench/timing.py with an empty folder of results."""
    module = bench("timing")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(bench("plot"), "RESULTS", tmp_path)
    return module


def small(bench, dtype=torch.float32, options=None, **sizes):
    """A setting of the gated SmolLM2 block with another case's sizes."""
    return bench("measure").Setting("smollm2-135m", Case("small", **sizes), dtype, "", options)


INDEX = torch.tensor([0, 1, 16])


def test_columns_cost_the_memory_lines_that_hold_them(bench):
    lines = bench("measure").lines
    chosen = torch.tensor([0, 1, 15, 16, 40])
    assert lines(chosen, 64, itemsize=4, line=64).tolist() == [1, 1, 1, 2, 3]
    assert lines(chosen, 64, itemsize=4, line=32).tolist() == [1, 1, 2, 3, 4]
    assert lines(chosen, 64, itemsize=2, line=64).tolist() == [1, 1, 1, 1, 2]
    assert lines(None, 5, itemsize=32, line=64).tolist() == [1, 1, 2, 2, 3]
    assert lines(torch.tensor([], dtype=torch.int64), 64, 4, 64).tolist() == []


def test_costs_of_the_capture_counted_by_hand(bench):
    """2 edits, 3 templates, 5 neurons, SiLU, float32."""
    at = small(bench, n_edits=2, n_templates=3, d_ff=5)
    cost = bench("capture_keys").cost(at, bench("capture_keys").inputs(at, "cpu"), "cpu")
    # gate and up 2 * 30 floats, 3 weights, 10 keys, 5 masses; silu 4, up 1, mean 2 per element, mass 2 per key
    assert (cost.bytes, cost.flops) == (4 * (60 + 3 + 10 + 5), 7 * 30 + 2 * 10)


def test_costs_of_the_selection_counted_by_hand(bench):
    at = small(bench, n_edits=1, d_ff=10, options={"share": 0.3})
    cost = bench("select_neurons").cost(at, bench("select_neurons").inputs(at, "cpu"), "cpu")
    assert (cost.bytes, cost.flops) == (10 * 4 + 3 * 8, 10)
    scores = torch.tensor([1.0, 5.0, 2.0, 2.0])
    cost = bench("select_neurons").cost(at, (scores, {"reaching": 0.6}), "cpu")
    assert cost.bytes == 4 * 4 + 2 * 8


def test_costs_of_the_system_matrix_counted_by_hand(bench):
    """32 neurons in two lines of 64 bytes, columns 0, 1, 16 of them, 2 edits, float64 result, with history."""
    moment, keys = torch.zeros(32, 32), torch.zeros(2, 32)
    given = (moment, 12.5, keys, moment, INDEX, torch.float64)
    cost = bench("masked_gram").cost(small(bench, n_edits=2, d_ff=32), given, "cpu")
    # rows of the triangle: 1, 1 and 2 lines, in C and in H; 2 keys of 2 lines; 9 doubles; 6 pairs of 2 * 2 + 2
    assert (cost.bytes, cost.flops, cost.dtype) == (2 * 4 * 64 + 4 * 64 + 72, 36, torch.float64)
    alone = bench("masked_gram").cost(small(bench, n_edits=2, d_ff=32), (*given[:3], None, *given[4:]), "cpu")
    assert (cost.bytes - alone.bytes, cost.flops - alone.flops) == (256, 6)


def test_costs_of_the_updates_counted_by_hand(bench):
    history = torch.zeros(3, 3)
    cost = bench("gram_update").cost(small(bench, n_edits=2, d_ff=3), (history, torch.zeros(2, 3)), "cpu")
    assert (cost.bytes, cost.flops) == (4 * (6 + 9 + 6), 6 * 5)
    delta = bench("apply_delta")
    residual, solution = torch.zeros(2, 2), torch.zeros(3, 2)
    at = small(bench, n_edits=2, d_ff=32, d_model=2)
    cost = delta.cost(at, (torch.zeros(2, 32), residual, solution, INDEX, None), "cpu")
    # 2 rows of 2 lines, in and out; 4 residuals, 6 of the solution, 3 indices; 6 elements of 2 * 2 + 1
    assert (cost.bytes, cost.flops) == (2 * 4 * 64 + 16 + 24 + 24, 30)
    half = torch.zeros(2, 32, dtype=torch.bfloat16)
    cost = delta.cost(at, (half, residual, solution, INDEX, torch.zeros(2, 32)), "cpu")
    # the rounded weight is only written, 1 line per row
    assert cost.bytes == 2 * 64 + 2 * 4 * 64 + 64
    adam = bench("sparse_adam")
    at = small(bench, n_edits=2, d_ff=1, d_model=3)
    cost = adam.cost(at, adam.inputs(at, "cpu"), "cpu")
    assert (cost.bytes, cost.flops) == (4 * 7 * 6 + 4 * 2 * 2, 24 * 6)


def test_the_roof_is_the_slower_of_memory_and_arithmetic(bench):
    measure = bench("measure")
    rates = SimpleNamespace(copy=10.0, products={torch.float32: 100.0})
    assert measure.Rates.roof(rates, measure.Cost(20, 100)) == pytest.approx(2e-9)
    assert measure.Rates.roof(rates, measure.Cost(20, 1000)) == pytest.approx(10e-9)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_every_baseline_computes_the_op(bench, run, monkeypatch, op, gated):
    module = bench(op)
    monkeypatch.setitem(bench("measure").SIZES, "smollm2-135m", bench("measure").Size(40, 11, "gelu_tanh", gated))
    # A sweep may have rows that belong to a model of another size; a small case replaces them all.
    rows = [row for row in module.sweep(["smollm2-135m"], "cpu") if row.case.n_edits <= 100]
    assert rows
    for at in rows:
        given = module.inputs(at, "cpu")
        assert run.wrong(module, given, list(module.PLAIN)) == {}


@pytest.mark.parametrize("rule", [{"top_k": 20}, {"reaching": 0.5}])
def test_the_baselines_of_the_selection_keep_its_promises(bench, rule):
    module, score = bench("select_neurons"), torch.arange(60.0) % 3
    for form in module.PLAIN.values():
        assert torch.equal(form((score, rule)), module.call((score, rule)))
        for bad in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match="scores from"):
                form((score.clone().index_fill_(0, torch.tensor(7), bad), rule))


@pytest.fixture
def backend(monkeypatch):
    """A second backend of gram_update, whose function the test may replace."""
    module = SimpleNamespace(supports=lambda *_: None, worth=lambda *_: None, gram_update=gram_update_torch)
    original = _dispatch.module_of
    monkeypatch.setattr(_dispatch, "kinds", lambda op: ("cpp",))
    # Also where no compiler was found at install.
    monkeypatch.setattr(_dispatch, "present", lambda op: ("cpp",))
    monkeypatch.setattr(_dispatch, "module_of", lambda op, name: module if name == "cpp" else original(op, name))
    return module


def test_a_backend_is_compared_told_when_it_cannot_and_never_timed_when_wrong(bench, run, backend):
    module = bench("gram_update")
    given = module.inputs(small(bench, n_edits=3, d_ff=30), "cpu")
    assert [found.name for found in run.contestants(module, given)] == ["torch: one product", "torch", "cpp"]
    assert run.wrong(module, given, ["cpp"]) == {}
    assert run.chosen_by_itself(module, given) == "cpp"
    backend.worth = lambda *_: "slower below 100 neurons"
    assert run.chosen_by_itself(module, given) == "torch"
    backend.supports = lambda *_: "it was not compiled"
    assert "it was not compiled" in run.wrong(module, given, ["cpp"])["cpp"]
    backend.supports = lambda *_: None
    backend.gram_update = lambda args: args.history.addmm_(args.keys.T, args.keys, alpha=1.01)
    assert run.wrong(module, given, ["cpp"]) == {"cpp": "FAULT: wrong result"}
    backend.gram_update = lambda args: args.history.fill_(float("nan"))
    assert run.wrong(module, given, ["cpp"]) == {"cpp": "FAULT: wrong result"}
    backend.gram_update = lambda args: args.history.view(7)
    assert run.wrong(module, given, ["cpp"]) == {"cpp": "FAULT: RuntimeError"}
    backend.gram_update = lambda args: None
    options = run.arguments(["--budget", "0", "--device", "cpu"])
    rates = SimpleNamespace(measure=lambda dtype: None, roof=lambda cost: 1.0, copy=1.0, products={torch.float32: 1.0})
    faults = []
    rows = run.measure(module, small(bench, n_edits=3, d_ff=30), options, rates, faults)
    assert {row["backend"] for row in rows} == {"torch: one product", "torch"}
    assert faults == ["gram_update smollm2-135m: cpp, FAULT: wrong result"]


def test_calls_take_turns_and_none_is_lost(bench):
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = bench("measure").timed(calls, "cpu", lambda: order.append("flush"), rounds=3)
    assert "".join(name for name in order if name != "flush") == "abcbcacab"
    assert order[::2] == ["flush"] * 9
    assert {name: len(took) for name, took in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_percentiles_and_rounds(bench):
    measure = bench("measure")
    assert measure.percentiles([float(i) for i in range(11)]) == (5.0, 2.0, 8.0)
    assert [measure.rounds_for(seconds, 2.0) for seconds in ([10.0], [0.01, 0.03], [1e-9])] == [5, 50, 200]


def test_memory_of_a_call_is_seen(bench):
    megabytes = bench("measure").extra_mb(lambda: torch.zeros(50 << 18).add(1), "cpu")
    assert 95 < megabytes < 130


TESTS = {"pass": "def test_one():\n    assert True\n", "fail": "def test_one():\n    assert 1 == 2\n", "empty": ""}


@pytest.mark.parametrize("kind", ["pass", "fail", "empty", "missing"])
def test_the_gate_is_green_only_when_tests_ran_and_passed(run, monkeypatch, tmp_path, kind):
    (tmp_path / "tests/ops").mkdir(parents=True)
    if kind != "missing":
        (tmp_path / "tests/ops/test_gram_update.py").write_text(TESTS[kind], encoding="utf-8")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    answer = run.gate("gram_update", "cpu")
    assert (answer is None) == (kind == "pass")
    if kind == "fail":
        assert "assert 1 == 2" in answer


def test_an_op_whose_tests_fail_is_not_timed(run, timing, monkeypatch, capsys):
    monkeypatch.setattr(run, "gate", lambda op, device: None if op == "select_neurons" else "1 failed")
    arguments = ["gram_update", "select_neurons", "--sizes", "smollm2-135m", "--budget", "0", "--device", "cpu"]
    assert run.main([*arguments, "--json"]) == 1
    out, err = capsys.readouterr()
    assert "gram_update: its tests do not pass, it is not timed\n1 failed" in err
    assert {row["op"] for row in json.loads(out)["rows"]} == {"select_neurons"}
    kept = timing.read_rows(timing.RESULTS / f"{timing.device_name('cpu')}.csv")
    assert {row["benchmark"] for row in kept} == {"select_neurons"}
    assert {row["commit"] for row in kept} == {timing.commit()}
    assert all(float(row["low"]) <= float(row["median"]) <= float(row["high"]) for row in kept)
    assert all(row["torch"] == torch.__version__ for row in kept)


def test_without_the_gate_no_row_is_kept(run, timing):
    arguments = ["select_neurons", "--sizes", "smollm2-135m", "--budget", "0", "--device", "cpu", "--no-gate"]
    assert run.main(arguments) == 0
    assert list(timing.RESULTS.iterdir()) == []


def test_an_unknown_op_is_named(run, capsys):
    with pytest.raises(SystemExit):
        run.arguments(["gram"])
    assert "no benchmark of gram; there are apply_delta" in capsys.readouterr().err


def test_rows_are_appended_and_an_older_file_keeps_its_rows(timing):
    path = timing.RESULTS / f"{timing.device_name('cpu')}.csv"
    path.write_text("date,commit,benchmark,median\n2026-01-01,abc1234+,editing,18.7\n", encoding="utf-8")
    for median in (1, 2):
        assert timing.append_row("cpu", benchmark="editing", median=median, gbytes_s=3) == path
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(timing.FIELDS)
    assert [row["median"] for row in rows] == ["18.7", "1", "2"]
    assert [rows[0][name] for name in ("date", "commit", "benchmark", "gbytes_s")] == [
        "2026-01-01",
        "abc1234+",
        "editing",
        "",
    ]
    assert rows == timing.read_rows(path)


def test_a_column_that_is_not_known_is_refused_and_changes_nothing(timing):
    path = timing.RESULTS / f"{timing.device_name('cpu')}.csv"
    with pytest.raises(ValueError, match="no such columns: speed; there are date, commit"):
        timing.append_row("cpu", speed=3)
    assert not path.exists()
    path.write_text("date,speed\n2026-01-01,3\n", encoding="utf-8")
    with pytest.raises(ValueError, match="columns speed are not known here"):
        timing.append_row("cpu", median=3)
    assert path.read_text(encoding="utf-8") == "date,speed\n2026-01-01,3\n"


def test_the_rows_in_the_repository_are_readable(bench):
    rows = [row for path in sorted((ROOT / "bench/results").glob("*.csv")) for row in bench("timing").read_rows(path)]
    assert rows
    assert all(float(row["median"]) > 0 and row["commit"] and row["unit"] for row in rows)


def test_the_commit_comes_from_outside_where_there_is_no_repository(timing, monkeypatch, tmp_path):
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "bench" / "results")
    assert timing.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "abc1234")
    assert timing.commit() == "abc1234"


def test_the_picture_takes_the_newest_rows_and_the_fastest_torch(bench):
    plot = bench("plot")
    common = {"benchmark": "gram_update", "shape": "m", "dtype": "float32", "metric": plot.METRIC}
    rows = [
        {**common, "backend": backend, "median": median}
        for backend, median in (("cpp", "9"), ("torch", "5"), ("torch: one product", "4"), ("cpp", "1"))
    ]
    found = plot.newest([*rows, {**rows[0], "metric": "seconds per edit"}])
    assert {name: row["median"] for name, row in found["gram_update"]["m float32"].items()} == {
        "torch": "4",
        "cpp": "1",
    }


DEVICE_SH = ["bash", str(ROOT / "bench/device.sh")]


def test_the_device_script_names_its_parts_and_what_is_missing(tmp_path):
    done = subprocess.run([*DEVICE_SH, "tests"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (100, "no part tests; there are build, test, sanitize, ops, editing\n")
    bare = tmp_path / "python"
    # Without site-packages, this interpreter has none of what the package needs.
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(bare), "OUT": str(tmp_path / "out"), "DEVICE": "cpu"}
    done = subprocess.run([*DEVICE_SH, "ops"], capture_output=True, text=True, env=environment)
    assert done.returncode == 100
    assert "missing, carry their wheels in the folder $WHEELS: torch transformers" in done.stderr
    assert "pybind11 is not installed: no build" in done.stdout
