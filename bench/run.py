"""Time ops: every backend of this machine against plain torch, at the sizes of real models.

    python bench/run.py                                       every op at every size
    python bench/run.py masked_gram capture_keys --sizes llama-3-8b --threads 2

An op's tests run first, and every backend's result at every size is compared with torch's; an op that fails is not
timed. The backends take turns in one process. The caches are emptied before each call of an op that an edit calls with
cold caches. `roof` is the share of max(bytes / copy rate, operations / product rate) that is reached, with both rates
measured in the same run; bytes and operations are the least that the op needs (bench/<op>.py says which). `extra MB` is
the memory taken beyond the inputs. `gain` is the speed-up over the fastest form in torch: the package's own, or one
written by hand in bench/<op>.py. A star marks the automatic choice.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import plot
import torch
from measure import (
    SIZES,
    Cost,
    Flush,
    Rates,
    Setting,
    available_bytes,
    extra_mb,
    percentiles,
    rounds_for,
    timed,
)
from timing import append_row, device_name, machine_line, versions
from torch import Tensor

from fastedit.ops import _dispatch
from fastedit.testing import relative_error

ROOT = Path(__file__).resolve().parent.parent
OPS = tuple(sorted(path.stem for path in (ROOT / "fastedit/ops").glob("[a-z]*.py")))
TIMED = tuple(op for op in OPS if (ROOT / f"bench/{op}.py").is_file())
# Relative errors far above rounding in each dtype, far below those of a wrong index or a lost tile.
AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-8}
FAULT = "FAULT"

log = logging.getLogger(__name__)


class Contestant(NamedTuple):
    """name: a backend, "torch: how" for a plain form, "yardstick: what" for something else to measure by;
    call: runs it once on the setting's inputs."""

    name: str
    call: Callable[[], Any]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"default: all of {', '.join(TIMED)}")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES), help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch and of the C++ kernels; default: torch's own")
    parser.add_argument("--only", default="", help="settings whose label contains this text")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for one setting, about")
    parser.add_argument("--no-gate", action="store_true", help="do not run the tests first; then no rows are stored")
    parser.add_argument("--no-rows", action="store_true", help="do not append to bench/results")
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of the table")
    options = parser.parse_args(argv)

    unknown = sorted(set(options.ops) - set(TIMED))
    if unknown:
        parser.error(f"no benchmark of {', '.join(unknown)}; there are {', '.join(TIMED)}")
    return options


def gate(op: str, device: str) -> str | None:
    """None if the op's tests pass, else the end of their output. No tests, or none that ran, count as a failure."""
    tests = ROOT / f"tests/ops/test_{op}.py"
    if not tests.is_file():
        return f"{tests} is missing"
    marked = "not slow" if device == "cuda" else "not slow and not gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", marked, "-p", "no:cacheprovider", str(tests)]
    # The tests choose backends themselves.
    environment = {name: value for name, value in os.environ.items() if name != "FASTEDIT_BACKEND"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stdout + done.stderr)[-3000:]


def contestants(module: ModuleType, given: tuple[Any, ...]) -> list[Contestant]:
    """Yardsticks and torch's forms first, then every backend of the op.

    Triton's interpreter, which runs on the CPU, does not enter: its speed says nothing."""
    plain = {**getattr(module, "YARDSTICKS", {}), **module.PLAIN}
    entered = [Contestant(name, lambda form=form: form(given)) for name, form in plain.items()]

    on_gpu = any(isinstance(part, Tensor) and part.is_cuda for part in given)
    backends = [name for name in _dispatch.kinds(module.__name__) if on_gpu or name != "triton"]
    for name in ("torch", *backends):
        entered.append(Contestant(name, lambda name=name: on_backend(name, module, given)))
    return entered


def on_backend(name: str, module: ModuleType, given: tuple[Any, ...]) -> Any:
    with _dispatch.backend(name):
        return module.call(given)


def chosen_by_itself(module: ModuleType, given: tuple[Any, ...]) -> str:
    """The backend that the automatic choice takes for these inputs."""
    choices: list[str] = []
    automatic = _dispatch.automatic

    def remember(op: str, args: NamedTuple) -> str:
        choices.append(automatic(op, args))
        return choices[-1]

    with mock.patch.object(_dispatch, "automatic", remember):
        module.call(given)
    return choices[0] if choices else str(_dispatch.wanted())


def copies(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(part.clone() if isinstance(part, Tensor) else part for part in given)


def wrong(module: ModuleType, given: tuple[Any, ...], names: list[str]) -> dict[str, str]:
    """Why a contestant may not be timed here: it cannot run these inputs, or its result differs from torch's."""

    def outcome(name: str) -> tuple[Tensor, ...]:
        own = copies(given)
        (call,) = (each.call for each in contestants(module, own) if each.name == name)
        return module.results(own, call())

    expected = outcome("torch")
    reasons: dict[str, str] = {}
    for name in names:
        try:
            results = outcome(name)
        except _dispatch.BackendUnavailable as error:
            reasons[name] = str(error)
            continue
        except Exception as error:
            # One broken kernel must not cost the rows of the others.
            log.exception("%s: %s", module.__name__, name)
            reasons[name] = f"{FAULT}: {type(error).__name__}"
            continue

        if not all(agree(result, reference) for result, reference in zip(results, expected, strict=True)):
            reasons[name] = f"{FAULT}: wrong result"
    return reasons


def agree(result: Tensor, reference: Tensor) -> bool:
    """Whether a result is the reference, up to rounding where it is no index."""
    if not reference.is_floating_point():
        return torch.equal(result, reference)
    return relative_error(result, reference) <= AGREEMENT[reference.dtype]


def measure(
    module: ModuleType, at: Setting, options: argparse.Namespace, rates: Rates, faults: list[str]
) -> list[dict[str, Any]]:
    """A row for every contestant that can run the setting, and a line on those that cannot; a kernel that fails or is
    wrong is also added to the faults."""
    device = options.device
    with torch.no_grad():
        given = module.inputs(at, device)
        cost: Cost = module.cost(at, given, device)
        entered = contestants(module, given)
        rivals = [each.name for each in entered if each.name != "torch" and not each.name.startswith("yardstick")]
        reasons = wrong(module, given, rivals)
        for name, reason in reasons.items():
            say(options, f"  {module.__name__} {at}: {name} left out, {reason}")
            faults += [f"{module.__name__} {at}: {name}, {reason}"] if reason.startswith(FAULT) else []

        running = {each.name: each.call for each in entered if each.name not in reasons}
        flush = Flush(device) if module.COLD or device == "cuda" else None
        first = timed(running, device, flush, rounds=2)
        rates.measure(cost.dtype)
        rounds = rounds_for((min(seconds) for seconds in first.values()), options.budget)

        seconds = timed(running, device, flush, rounds)
        rates.measure(cost.dtype)
        extra = {name: extra_mb(call, device) for name, call in running.items()}
        choice = chosen_by_itself(module, given)

    return [row_of(module.__name__, at, name, seconds, extra[name], cost, rates, name == choice) for name in seconds]


def row_of(
    op: str,
    at: Setting,
    name: str,
    seconds: dict[str, list[float]],
    extra: float,
    cost: Cost,
    rates: Rates,
    chosen: bool,
) -> dict[str, Any]:
    """The row of the contestant `name`. seconds: of every contestant; extra: MB; chosen: by the automatic choice."""
    p50, p20, p80 = percentiles(seconds[name])
    best_torch = min(percentiles(taken)[0] for form, taken in seconds.items() if form.startswith("torch"))
    return {
        "op": op,
        "setting": str(at),
        "dtype": str(at.dtype).removeprefix("torch."),
        "backend": name,
        "ms_p50": p50 * 1e3,
        "ms_p20": p20 * 1e3,
        "ms_p80": p80 * 1e3,
        "gbytes_s": cost.bytes / p50 / 1e9,
        "gflops": cost.flops / p50 / 1e9,
        "roof_share": rates.roof(cost) / p50,
        "extra_mb": extra,
        "gain": best_torch / p50,
        "chosen": chosen,
        "rounds": len(seconds[name]),
        "copy_gbytes_s": rates.copy,
        "product_gflops": rates.products[cost.dtype],
    }


def say(options: argparse.Namespace, text: str) -> None:
    """Print for the reader; with --json standard output is for the rows."""
    print(text, file=sys.stderr if options.json else sys.stdout, flush=True)


def table_line(row: dict[str, Any]) -> str:
    star = "*" if row["chosen"] else " "
    return (
        f"{star} {row['backend']:<26}{row['ms_p50']:>10.3f}{row['ms_p20']:>10.3f}{row['ms_p80']:>10.3f}"
        f"{row['gbytes_s']:>9.1f}{row['gflops']:>10.1f}{row['roof_share']:>8.0%}{row['extra_mb']:>10.1f}"
        f"{row['gain']:>8.2f}"
    )


HEADING = (
    f"  {'backend':<26}{'ms p50':>10}{'p20':>10}{'p80':>10}{'GB/s':>9}{'GFLOP/s':>10}{'roof':>8}{'extra MB':>10}"
    f"{'gain':>8}"
)


def keep(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    for row in rows:
        append_row(
            options.device,
            benchmark=row["op"],
            backend=row["backend"],
            shape=row["setting"],
            dtype=row["dtype"],
            metric="ms p50, p20, p80",
            median=f"{row['ms_p50']:.4g}",
            low=f"{row['ms_p20']:.4g}",
            high=f"{row['ms_p80']:.4g}",
            unit="ms",
            peak_mb=f"{row['extra_mb']:.1f}",
            gemm_gflops=round(row["product_gflops"]),
            gbytes_s=f"{row['gbytes_s']:.4g}",
            gflops=f"{row['gflops']:.4g}",
            roof_share=f"{row['roof_share']:.3f}",
            copy_gbytes_s=f"{row['copy_gbytes_s']:.1f}",
            chosen="yes" if row["chosen"] else "",
        )


def time_op(op: str, options: argparse.Namespace, rates: Rates, faults: list[str]) -> list[dict[str, Any]]:
    """All rows of an op, each printed and stored as soon as it is measured."""
    module = importlib.import_module(op)
    rows: list[dict[str, Any]] = []
    for at in module.sweep(options.sizes, options.device):
        if options.only not in str(at):
            continue
        if module.memory(at) > available_bytes(options.device):
            say(options, f"\n{op} {at}: left out, needs up to {module.memory(at) / 2**30:.1f} GiB of free memory")
            continue

        measured = measure(module, at, options, rates, faults)
        say(options, f"\n{op} {at} {str(at.dtype).removeprefix('torch.')}, {measured[0]['rounds']} rounds\n{HEADING}")
        for row in measured:
            say(options, table_line(row))
        if not (options.no_rows or options.no_gate):
            keep(measured, options)
        rows += measured
    return rows


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    say(options, machine_line(options.device))
    say(options, ", ".join(f"{name} {version}" for name, version in versions().items() if version))

    rates = Rates(options.device)
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for op in options.ops or TIMED:
        failure = None if options.no_gate else gate(op, options.device)
        if failure is not None:
            faults.append(f"{op}: its tests do not pass, it is not timed")
            say(options, f"\n{faults[-1]}\n{failure}")
            continue
        rows += time_op(op, options, rates, faults)

    say(options, f"\n{rates}")
    if options.json:
        json.dump({"device": device_name(options.device), "versions": versions(), "rows": rows}, sys.stdout, indent=1)
    if rows and not (options.no_rows or options.no_gate):
        picture = plot.draw(device_name(options.device))
        say(options, f"rows in bench/results/{device_name(options.device)}.csv, {picture}")
    for fault in faults:
        say(options, fault)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
