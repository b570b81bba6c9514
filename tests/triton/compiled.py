"""Cross-compiles what the host code launches, without a GPU: signature and constants come from the launch itself.

`Compiled` also reads back, with the cuobjdump that triton brings along, what ptxas made of a kernel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from normfused.backends.triton import launch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Launch:
    kernel: Any
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches of the host code within, none of which happens."""
    launches: list[Launch] = []
    before = launch.launcher
    launch.launcher = lambda kernel, programs, *args, **options: launches.append(Launch(kernel, programs, args, options))
    try:
        yield launches
    finally:
        launch.launcher = before


@dataclass(frozen=True)
class Compiled:
    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    local_accesses: int  # spills: LDL and STL
    wide_loads: int
    loads: int
    wide_stores: int
    stores: int
    instructions: int
    ptx: str


def compile_launch(call: Launch, capability: int) -> Compiled:
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(call.kernel.signature, call.kernel.params, backend)
    bound, specialization, _ = bind(*call.args, **call.options)
    options = {"num_warps": call.options["num_warps"]}
    parsed, signature, constexprs, attrs = call.kernel._pack_args(backend, options, bound, specialization, None)
    binary = triton.compile(ASTSource(call.kernel, signature, constexprs, attrs), target=target, options=parsed.__dict__)
    return _read(call.kernel.__name__, binary, capability)


def _read(name: str, binary: Any, capability: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("--dump-sass", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    count = lambda pattern: len(re.findall(pattern, sass))  # noqa: E731
    return Compiled(
        name, numbers["REG"], binary.metadata.shared, numbers["STACK"], count(r"\b(?:LDL|STL)\b"),
        count(r"\bLDG\.\S*128"), count(r"\bLDG\."), count(r"\bSTG\.\S*128"), count(r"\bSTG\."), count(r"(?m)^\s+/\*[0-9a-f]{4,}\*/"),
        binary.asm["ptx"],
    )  # fmt: skip


def _cuobjdump(*args: str) -> str:
    return subprocess.run([str(CUOBJDUMP), *args], check=True, capture_output=True, text=True).stdout
