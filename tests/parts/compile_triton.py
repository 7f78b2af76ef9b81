"""Compiles the Triton kernels of launches for a device that need not be there: `compiled(90)` patches Triton's driver.

A launcher that is called in the block (on CPU tensors) has its arguments bound and its kernels compiled to machine code
as on the device; nothing runs, so what it returns is not to be read.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


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
