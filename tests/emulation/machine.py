"""Builds C++ over the SIMT emulation with g++, and controls the emulation in it."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
HEADERS = [ROOT / "csrc/kernels/device.cuh", ROOT / "csrc/emulation/simt.h"]
EMULATOR = ROOT / "csrc/emulation/simt.cpp"
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-DNF_EMULATION"]
ORDERS = {"forward": 0, "reverse": 1, "starve": 2}


@cache
def cuda() -> Path | None:
    """The toolkit, of which g++ needs the headers."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parents[1] if nvcc else None, "/usr/local/cuda"]
    return next((Path(p) for p in places if p and (Path(p) / "include/cuda_fp16.h").exists()), None)


def compile_command(*arguments: str | Path) -> list[str]:
    if cuda() is None or shutil.which("g++") is None:
        pytest.skip("needs g++ and the headers of the CUDA toolkit")
    return ["g++", *FLAGS, "-isystem", str(cuda() / "include"), *map(str, arguments)]


def _made(suffix: str, inputs: list[Path], *arguments: str | Path) -> Path:
    """A file compiled from ``inputs``, anew only when they or the headers change."""
    digest = hashlib.sha256(repr(arguments).encode() + repr(FLAGS).encode())
    for path in [*inputs, *HEADERS]:
        digest.update(path.read_bytes())
    made = ROOT / "build/emulation-tests" / f"{inputs[0].stem}-{digest.hexdigest()[:16]}{suffix}"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        partial = made.with_suffix(f".{os.getpid()}{suffix}")
        subprocess.run([*compile_command(*inputs, *arguments), "-o", partial], check=True)
        partial.rename(made)
    return made


def build(source: str, *flags: str) -> Path:
    """The library of a source of this directory and the emulator."""
    emulator = _made(".o", [EMULATOR], "-c", *flags)
    return _made(".so", [HERE / source, emulator], "-shared", *flags)


class Machine:
    """The emulation in a library, in one of its modes."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name in ("message", "tensors", "sites"):
            getattr(self.library, f"nf_emulation_{name}").restype = ctypes.c_char_p

    def mode(self, order: str = "forward", seed: int = 0, races: bool = False, traffic: bool = False) -> Machine:
        """Sets the mode and forgets what came before."""
        self.library.nf_emulation_order(ORDERS[order], seed)
        self.library.nf_emulation_races(races)
        self.library.nf_emulation_traffic(traffic)
        self.library.nf_emulation_reset()
        return self

    def run(self, function: str, name: str, *arguments: int) -> int:
        return int(getattr(self.library, function)(name.encode(), *arguments))

    @property
    def message(self) -> str:
        return self.library.nf_emulation_message().decode()

    def counts(self, tensor: str) -> list[int]:
        out = (ctypes.c_longlong * 8)()
        self.library.nf_emulation_counters(tensor.encode(), out)
        return list(out)

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self.library.nf_emulation_tensors().decode())

    @property
    def sites(self) -> list[dict[str, Any]]:
        return json.loads(self.library.nf_emulation_sites().decode())

    def skip(self, file: str = "", line: int = 0) -> None:
        self.library.nf_emulation_skip(file.encode(), line)


def machine(source: str, *flags: str) -> Iterator[Machine]:
    """For a fixture: the modes are left as they are by default."""
    made = Machine(build(source, *flags))
    yield made
    made.skip()
    made.mode()
