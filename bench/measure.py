"""Shared by the op benchmarks: real sizes, bytes that have to move, rates of the machine, and interleaved timing."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import peak_mb, reset_peak, resident_mb
from torch import Tensor

from fastedit.testing import Case

GIB = 1 << 30


class Size(NamedTuple):
    """A model's feed-forward block."""

    d_ff: int
    d_model: int
    activation: str = "silu"
    gated: bool = True


SIZES = {
    "smollm2-135m": Size(1536, 576),
    "gpt-j-6b": Size(16384, 4096, "gelu_tanh", gated=False),
    "llama-3-8b": Size(14336, 4096),
    "qwen2.5-7b": Size(18944, 3584),
}
N_EDITS, N_TEMPLATES = 100, 6
SHARES = (0.3, 0.8)


@dataclass(frozen=True)
class Setting:
    """One row of a sweep: a model's size, the factory's case, the dtype of the weights or results, and other options of
    the op. label: distinguishes it from the model's other rows."""

    model: str
    case: Case
    dtype: torch.dtype
    label: str
    options: Mapping[str, Any] | None = None

    @property
    def size(self) -> Size:
        return SIZES[self.model]

    def __str__(self) -> str:
        return f"{self.model} {self.label}".strip()


class Cost(NamedTuple):
    """The least that an op needs: bytes read and written, floating-point operations, and the dtype of these."""

    bytes: int
    flops: int
    dtype: torch.dtype = torch.float32


def setting(model: str, label: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Setting:
    """A row for `model`; `share` of the neurons are selected where given, `options` go into the setting."""
    size = SIZES[model]
    share = changes.pop("share", None)
    options = changes.pop("options", None)
    case = {"n_edits": N_EDITS, "n_templates": N_TEMPLATES, "d_ff": size.d_ff, "d_model": size.d_model}
    if share is not None:
        case["selected"] = round(share * size.d_ff)
    return Setting(model, Case(model, **{**case, **changes}), dtype, label, options)


def size_of(*tensors: Tensor | None) -> int:
    """Bytes of the tensors' elements."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def lines(index: Tensor | None, width: int, itemsize: int, line: int) -> Tensor:
    """(k,) int64: memory lines of a row that hold the chosen columns up to and including each, for an aligned row of
    `width` elements. A memory fetches lines, not elements: most lines hold a chosen column at a share of 30 %."""
    chosen = torch.arange(width) if index is None else index.cpu()
    place = chosen * itemsize // line
    return torch.ones_like(place).index_fill_(0, (place.diff() == 0).nonzero().flatten() + 1, 0).cumsum(0)


def line_bytes(device: str) -> int:
    """What one fetch from memory brings: a cache line, or a sector of a GPU's L2."""
    return 32 if device == "cuda" else 64


class Rates:
    """Best rates of this machine so far: copy in GB/s, products in GFLOP/s by dtype. `measure` measures them again."""

    def __init__(self, device: str) -> None:
        self.device = device
        # Four times the last cache at least, and enough on a GPU to hide the launch.
        n = 1 << 28 if device == "cuda" else max(1 << 25, last_cache())
        self.source = torch.rand(n, device=device)
        self.target = torch.empty(n, device=device)
        self.copy = 0.0
        self.products: dict[torch.dtype, float] = {}

    def measure(self, dtype: torch.dtype) -> None:
        """Measure both rates again and keep the better values."""
        seconds = self._best(lambda: self.target.copy_(self.source))
        self.copy = max(self.copy, 2 * size_of(self.source) / seconds / 1e9)
        n = 8192 if self.device == "cuda" else 1536
        left, right = (torch.rand(n, n, device=self.device).to(dtype) for _ in "ab")
        seconds = self._best(lambda: left @ right)
        self.products[dtype] = max(self.products.get(dtype, 0.0), 2 * n**3 / seconds / 1e9)

    def _best(self, call: Callable[[], Any]) -> float:
        return min(timed({"": call}, self.device, None, rounds=4)[""][1:])

    def roof(self, cost: Cost) -> float:
        """Seconds that the cost takes at these rates."""
        return max(cost.bytes / (self.copy * 1e9), cost.flops / (self.products[cost.dtype] * 1e9))

    def __str__(self) -> str:
        products = ", ".join(f"{str(d).removeprefix('torch.')} {rate:.0f}" for d, rate in self.products.items())
        return f"copy {self.copy:.1f} GB/s (read + written); products in GFLOP/s: {products}"


class Flush:
    """Empties the caches by a pass over a buffer larger than the last of them."""

    def __init__(self, device: str) -> None:
        # On a GPU the pass has also to outlast the launch of what is timed after it.
        n = GIB // 4 if device == "cuda" else max(16 << 20, last_cache() // 2)
        self.buffer = torch.zeros(n, device=device)

    def __call__(self) -> None:
        self.buffer.add_(1)


def last_cache() -> int:
    """Bytes of the largest cache of processor 0; 32 MiB where the system does not say."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [re.fullmatch(r"(\d+)K", path.read_text(encoding="ascii").strip()) for path in files]
    return max((int(size.group(1)) << 10 for size in sizes if size), default=32 << 20)


def timed(
    calls: Mapping[str, Callable[[], Any]], device: str, flush: Flush | None, rounds: int
) -> dict[str, list[float]]:
    """Seconds of every call, `rounds` times; the calls take turns, and each round begins with another one.

    With `flush` the caches are emptied before each."""
    names = list(calls)
    taken: dict[str, list[Any]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]
                if flush is not None:
                    flush()
                taken[name].append(_once(calls[name], device))
    finally:
        if collecting:
            gc.enable()

    if device != "cuda":
        return taken
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in taken.items()}


def _once(call: Callable[[], Any], device: str) -> Any:
    """Seconds of one call; on a GPU the pair of events around it, which is read later."""
    if device != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    return start, end


def rounds_for(seconds: Iterable[float], budget: float) -> int:
    """How many rounds of calls of these durations fit into the budget, 5 to 200."""
    return min(200, max(5, int(budget / max(sum(seconds), 1e-9))))


def percentiles(seconds: list[float]) -> tuple[float, float, float]:
    """p50, p20, p80."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return tenths[4], tenths[1], tenths[7]


def extra_mb(call: Callable[[], Any], device: str) -> float:
    """Peak memory of one call beyond the memory used before it, its result included, in MB."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    release()
    reset_peak()
    resident = resident_mb()
    call()
    return max(0.0, peak_mb() - resident)


def release() -> None:
    """Let the C library return freed memory to the system; a call that took it again would seem to need none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_bytes(device: str) -> int:
    """Bytes of free memory."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    path = Path("/proc/meminfo")
    line = re.search(r"MemAvailable:\s+(\d+) kB", path.read_text(encoding="ascii")) if path.exists() else None
    return int(line.group(1)) << 10 if line else 16 * GIB
