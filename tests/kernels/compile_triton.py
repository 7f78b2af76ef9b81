"""Compiles the Triton kernels of launches for a device that need not be there: `compiled(90)` patches Triton's driver.

A launcher that is called in the block (on CPU tensors) has its arguments bound and its kernels compiled to machine code
as on the device; nothing runs, so what it returns is not to be read. As a program (not under Triton's interpreter):

    python tests/kernels/compile_triton.py 90
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastedit.kernels import (
    apply_delta,
    capture_keys,
    gram_update,
    masked_gram,
    score_neurons,
    select_neurons,
    sparse_adam,
    sparse_delta,
    system_chain,
)
from fastedit.ops.apply_delta import ApplyDelta
from fastedit.ops.capture_keys import CaptureKeys
from fastedit.ops.gram_update import GramUpdate
from fastedit.ops.masked_gram import MaskedGram
from fastedit.ops.score_neurons import ScoreNeurons
from fastedit.ops.select_neurons import SelectNeurons
from fastedit.ops.sparse_adam import AdamSettings, SparseAdam
from fastedit.ops.sparse_delta import SparseDelta
from fastedit.ops.system_chain import SystemChain


class Kernel(NamedTuple):
    """What the assembler says: registers and bytes of stack per thread, bytes of shared memory per block."""

    name: str
    registers: int
    stack: int
    shared: int
    sass: str


class CompileOnly:
    """The answers of a driver that compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def compiled(capability: int) -> Iterator[list[Kernel]]:
    """The list of kernels launched in the block, compiled for a compute capability."""
    kernels: list[Kernel] = []

    def compile_it(self: JITFunction, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            kernels.append(examined(self.run(*arguments, grid=grid, warmup=True, **options)))

        return launch

    original, driver = JITFunction.__getitem__, triton.runtime.driver._active
    triton.runtime.driver.set_active(CompileOnly(capability))
    JITFunction.__getitem__ = compile_it
    try:
        yield kernels
    finally:
        JITFunction.__getitem__ = original
        triton.runtime.driver._active = driver


def examined(kernel: Any) -> Kernel:
    """Ask the disassembler that Triton carries about a compiled kernel."""
    binary = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        report, sass = (
            subprocess.run([binary, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", report)
    if found is None:
        raise ValueError(f"cuobjdump says nothing about {kernel.metadata.name}: {report}")
    registers, stack, shared = map(int, found.groups())
    return Kernel(kernel.metadata.name, registers, stack, max(shared, kernel.metadata.shared), sass)


def launches(capability: int) -> Iterator[tuple[str, list[Kernel]]]:
    """One launch of every op, at sizes that stand for a model's, with every optional argument."""
    for dtype in (torch.float32, torch.bfloat16):
        yield from launches_of_rows(capability, dtype)

    for size in (1536, 14336):
        for name, rule in (("top_k", {"top_k": 5}), ("mass", {"reaching": 0.5})):
            with compiled(capability) as kernels:
                select_neurons.select_on_device(SelectNeurons(torch.zeros(size), **rule))
            yield f"select_neurons {name} {size}", kernels

    for dtype in (torch.float32, torch.float64):
        yield from launches_of_sums(capability, dtype)

    row, weight = torch.zeros(24, 1536, dtype=torch.bfloat16), torch.zeros(576, 1536, dtype=torch.bfloat16)
    with compiled(capability) as kernels:
        score_neurons.score_neurons(ScoreNeurons(row, weight, row[:, :576], 10))
    yield "score_neurons top_k", kernels


def launches_of_rows(capability: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Kernel]]]:
    """The ops whose rows or weights are in the dtype of the model."""
    row, square, active = torch.zeros(24, 1536), torch.zeros(1536, 1536), torch.ones(24, dtype=torch.bool)
    gate = torch.zeros(24, 6, 1536, dtype=dtype)
    rows = (gate, gate, torch.zeros(6), "gelu", active)
    with compiled(capability) as kernels:
        capture_keys.capture_keys(CaptureKeys(*rows))
    yield f"capture_keys {dtype}", kernels

    with compiled(capability) as kernels:
        system_chain.system_chain(SystemChain(*rows, square, 0.1, square, row, within=0.5))
    yield f"system_chain {dtype}", kernels

    weight, index = torch.zeros(576, 1536, dtype=dtype), torch.zeros(1536, dtype=torch.int64)
    with compiled(capability) as kernels:
        apply_delta.apply_delta(ApplyDelta(weight, torch.zeros(24, 576), row.T, index, weight.float()))
    yield f"apply_delta {dtype}", kernels


def launches_of_sums(capability: int, dtype: torch.dtype) -> Iterator[tuple[str, list[Kernel]]]:
    """The ops whose sums are taken in `dtype`."""
    row, square, active = torch.zeros(24, 1536), torch.zeros(1536, 1536), torch.ones(24, dtype=torch.bool)
    index, count = torch.zeros(1536, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    with compiled(capability) as kernels:
        args = MaskedGram(square, 0.1, row, square, index, dtype)
        masked_gram.masked_gram_on_device(args, count, row, active)
    yield f"masked_gram {dtype}", kernels

    with compiled(capability) as kernels:
        gram_update.gram_update(GramUpdate(square.to(dtype), row.to(dtype)))
    yield f"gram_update {dtype}", kernels

    state = torch.zeros(24, 576, dtype=dtype)
    with compiled(capability) as kernels:
        sparse_adam.sparse_adam(SparseAdam(*[state] * 4, 3, AdamSettings(0.1), state[:, 0], state[:, 0]))
    yield f"sparse_adam {dtype}", kernels

    starts = torch.zeros(5, dtype=torch.int64)
    with compiled(capability) as kernels:
        args = SparseDelta(state, starts, count, starts, state[:3], 0.5, state)
        sparse_delta.sparse_delta(args)
        sparse_delta.sparse_delta_grads(args)
    yield f"sparse_delta {dtype}", kernels

    with compiled(capability) as kernels:
        score_neurons.score_neurons(ScoreNeurons(row.to(dtype), square[:576].to(dtype), state))
    yield f"score_neurons {dtype}", kernels


def main() -> None:
    """One line of JSON per kernel: its launch, what the assembler says, which matrix instructions it has."""
    for launch, kernels in launches(int(sys.argv[1])):
        for kernel in kernels:
            matrix = sorted(set(re.findall(r"\b(HMMA|HGMMA|DMMA)\b", kernel.sass)))
            print(json.dumps({"launch": launch, **kernel._asdict(), "sass": None, "matrix": matrix}))


if __name__ == "__main__":
    main()
