"""Which commands a stage consists of. All of them work without a network and with what the Python that runs them has."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from .runner import Command, Stage

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("memcheck", "racecheck", "synccheck")
LIMITS = {
    "build": 540.0,
    "facts": 120.0,
    "test": 560.0,
    "silicon": 560.0,
    "sanitizer": 480.0,
    "bench": 560.0,
    "ncu": 300.0,
    "matrix": 560.0,
    "networks": 560.0,
}
NAMES = tuple(LIMITS)
RESULTS = "benchmark.json"
SPARE = 80.0  # seconds of a benchmark's stage for the case that is under way, tables and imports


def present(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def without(module: str, folders: Iterable[str]) -> list[str]:
    """Test files that import a module."""
    pattern = re.compile(rf"^\s*(from|import) {module}\b", re.MULTILINE)
    files = (f for folder in folders if not folder.startswith("-") for f in sorted((ROOT / folder).rglob("test_*.py")))
    return [f.relative_to(ROOT).as_posix() for f in files if pattern.search(f.read_text())]


def suite(name: str, paths: Iterable[str], folder: Path, device: dict[str, str], limit: float, parallel: bool = True) -> Command:
    paths = tuple(paths)
    left_out = [] if present("hypothesis") else without("hypothesis", paths)
    ignored = [f"--ignore={path}" for path in left_out]
    # nearly all of a small test is the host's time
    processes = min(8, os.cpu_count() or 1)
    side_by_side = ["-n", str(processes)] if parallel and present("xdist") else []
    timeout = ["--timeout", "180"] if present("pytest_timeout") else []
    argv = (sys.executable, "-m", "pytest", *paths, *ignored, *side_by_side, *timeout, "--maxfail=25", "-ra", "--tb=short")
    note = f"hypothesis is not installed, so these are left out: {' '.join(left_out)}" if left_out else ""
    return Command(name, (*argv, "-p", "no:cacheprovider", f"--junitxml={folder / f'test-{name}.xml'}"), device, limit, note=note)


def stages(names: Iterable[str], folder: Path, device: str = "cuda") -> list[Stage]:
    """On device ``cpu`` the same programs over the emulation, to try the commands without a GPU."""
    environment = {"NORMFUSED_TEST_DEVICE": "cuda"} if device == "cuda" else {"NORMFUSED_EMULATE": "1"}
    run = {} if device == "cuda" else environment
    python = (sys.executable, "-m")

    def build() -> list[Command]:
        how = () if device == "cuda" else ("--emulation",)
        return [
            Command("build", (*python, "normfused", "build", *how), limit=500),
            Command("doctor", (*python, "normfused"), run, limit=60),
        ]

    def facts() -> list[Command]:
        return [Command("facts", (*python, "bench.gpu.facts", "--device", device), run, limit=120)]

    def test() -> list[Command]:
        found = [
            suite("norms", ["tests/norms"], folder, environment, 300),
            suite("cuda", ["tests/cuda"], folder, environment, 200),
            suite("weights", ["tests/weights"], folder, environment, 200),
            # names of some of its tests hold addresses, which processes do not share
            suite("contract", ["tests/contract"], folder, environment, 300, parallel=False),
        ]
        if device == "cuda" and present("triton"):
            # test_compile.py needs no GPU
            found.append(suite("triton", ["tests/triton", "--ignore=tests/triton/test_compile.py"], folder, environment, 300))
        return found

    def silicon() -> list[Command]:
        """What only a GPU shows. One process: these tests look at launches and may need most of the memory."""
        return [suite("gpu", ["tests/gpu"], folder, environment, 560, parallel=False)]

    def sanitizer() -> list[Command]:
        tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        calls = (*python, "bench.gpu.calls", "--device", device)
        plain = [Command("plain", calls, run, limit=90)]
        # without torch's cache of blocks every tensor is an allocation, whose bounds the tool knows
        options = ("--kernel-name", "kns=normfused", "--error-exitcode", "86", "--print-limit", "20")
        checked = {**run, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return plain + [Command(name, (tool, "--tool", name, *options, *calls), checked, limit=180) for name in SANITIZERS]

    def benchmark(name: str, *options: str, file: str = "--resume") -> list[Command]:
        """The stages bench, matrix and networks write one file; the first begins it, the others go on with it where it is there."""
        common = ("--device", device, file, str(folder / RESULTS), "--seconds", "{seconds}")
        few = ("--providers", "eager", "normfused-cuda") if device == "cpu" else ()
        return [Command(name, (*python, "normfused", "bench", *options, *common, *few), run, limit=LIMITS[name], spare=SPARE)]

    def bench() -> list[Command]:
        what = ("--parts", "operators") if device == "cuda" else ("--op", "bn_relu", "--shape", "2x8x6x6")
        return benchmark("bench", *what, file="--json")

    def matrix() -> list[Command]:
        return benchmark("matrix", *(("--full", "--parts", "operators") if device == "cuda" else ("--op", "rms", "--shape", "16x64")))

    def networks() -> list[Command]:
        return benchmark("networks", "--parts", "networks", *(() if device == "cuda" else ("--quick",)))

    def ncu() -> list[Command]:
        return [Command("ncu", (*python, "bench.gpu.counters"), run, limit=300)]

    makers = {
        "build": build,
        "facts": facts,
        "test": test,
        "silicon": silicon,
        "sanitizer": sanitizer,
        "bench": bench,
        "ncu": ncu,
        "matrix": matrix,
        "networks": networks,
    }
    return [Stage(name, tuple(makers[name]()), LIMITS[name]) for name in names]
