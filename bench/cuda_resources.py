"""``python -m bench.cuda_resources``: registers, spills and SASS of every instantiation of the CUDA kernels, without a GPU.

Compiles csrc/kernels/instances with the build's own flags for sm_80, sm_90 and a newer architecture, one object per type and
architecture, and keeps in build/resources what did not change. Writes bench/results/cuda-resources.md, to be read, and
cuda-resources.json, which tests/cuda/test_resources.py holds the kernels to, and prints what differs from the JSON that was there.
``--arch`` and ``--types`` look at a part and write nothing.

What may spill is named in the JSON under "allowed", as a pattern of names with a reason; a run keeps it. A kernel that spills and is
not named there makes the run fail.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from normfused import _build
from normfused.activations import ACTIVATIONS

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "resources"
RESULTS = ROOT / "bench" / "results"
BASELINE = RESULTS / "cuda-resources.json"
TABLE = RESULTS / "cuda-resources.md"
ARCHITECTURES = ("8.0", "9.0")
NEWER = ("10.0", "12.0")  # the first that nvcc knows
BLOCK = 256  # threads that streaming kernels have, but for small tensors
ACTS = list(ACTIVATIONS)  # in the order of csrc/kernels/problem.h
TYPES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16", "d": "fp64"}
# Kernels that pass over tensors of x's size: all 16 bytes an access. The second set writes such tensors, too.
STREAMING = {"moments", "apply", "single_pass", "grad_moments", "grad_apply", "grad_single_pass", "grad_columns"}
WRITING = {"apply", "single_pass", "grad_apply", "grad_single_pass"}


@dataclass(frozen=True)
class Usage:
    """Of one kernel on one architecture; what needs a disassembler is None without."""

    registers: int
    spill_bytes: int  # stored and loaded, as ptxas counts them
    stack_bytes: int
    shared_bytes: int  # static
    wide_loads: int | None = None  # of global memory, 16 bytes each
    loads: int | None = None
    wide_stores: int | None = None
    stores: int | None = None
    local_accesses: int | None = None
    instructions: int | None = None


COLUMNS = [f.name for f in fields(Usage)]


# -------------------------------------------------------------------------------------------------------------- reading
def readable(mangled: str) -> str | None:
    """``grad_single_pass bf16 narrow/columns relu`` of a kernel's mangled name; None for what is no kernel of ours."""
    found = re.match(r"_ZN9normfused\d+(\w+?)_kernelI(f|d|6__half|13__nv_bfloat16)((?:L[bi]n?\d+E)*)E", mangled)
    if found is None:
        return None
    kernel, kind, arguments = found.groups()
    flags = [text == "1" for text in re.findall(r"Lb(\d)E", arguments)]
    numbers = [int(text.replace("n", "-")) for text in re.findall(r"Li(n?\d+)E", arguments)]
    view = "/".join(names[flag] for names, flag in zip((("narrow", "wide"), ("columns", "rows")), flags, strict=False))
    acts = ["other acts" if n < 0 else ACTS[n] for n in numbers[:1]]
    apart = ["samples"] if flags[2:3] == [True] else []  # of a single pass: statistics of every sample, too
    rest = [f"+{n:d}" for n in (*flags[3:], *numbers[1:])]  # template arguments that this function does not know yet
    return " ".join(word for word in (kernel, TYPES[kind], view, *acts, *apart, *rest) if word)


def family(name: str) -> str:
    return name.split()[0]


def type_of(name: str) -> str:
    return name.split()[1]


_USAGE = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stored>\d+) bytes spill stores, (?P<loaded>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def parse_usage(text: str) -> dict[str, Usage]:
    """What nvcc --resource-usage printed, by mangled name."""
    found = {}
    for m in _USAGE.finditer(text):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        found[m["name"]] = Usage(int(m["registers"]), int(m["stored"]) + int(m["loaded"]), int(m["stack"]), int(shared[1]) if shared else 0)
    return found


_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def count_instructions(lines: Iterable[str]) -> dict[str, dict[str, int]]:
    """Counts by mangled name, from cuobjdump --dump-sass."""
    found: dict[str, dict[str, int]] = {}
    counts: dict[str, int] = {}
    for line in lines:
        if "Function :" in line:
            counts = found.setdefault(line.split(":", 1)[1].strip(), dict.fromkeys(COLUMNS[4:], 0))
            continue
        match = _INSTRUCTION.match(line)
        if match is None or not counts:
            continue
        name, *modifiers = match[1].split(".")
        if name == "NOP":  # fills the last line of code
            continue
        counts["instructions"] += 1
        if name in ("LDG", "LDGSTS"):
            counts["loads"] += 1
            counts["wide_loads"] += "128" in modifiers
        elif name == "STG":
            counts["stores"] += 1
            counts["wide_stores"] += "128" in modifiers
        elif name in ("LDL", "STL"):
            counts["local_accesses"] += 1
    return found


@functools.cache
def _most_threads() -> tuple[int, int]:
    """Of a block along wide and along narrow sets."""
    source = (ROOT / "csrc" / "kernels" / "call.h").read_text()
    found = re.search(r"threads_of = kWide \? (\d+) : (\d+);", source)
    assert found is not None, "csrc/kernels/call.h has no threads_of that this script can read"
    return int(found[1]), int(found[2])


def largest_block(name: str) -> int:
    """The most threads that a kernel is launched with."""
    wide, narrow = _most_threads()
    if family(name) not in STREAMING and family(name) not in ("settle", "grad_settle"):
        return 256
    return wide if " wide" in name else narrow


def blocks_per_processor(registers: int, threads: int) -> int:
    """What registers allow of 65,536, which all architectures from 8.0 on have in four parts, given out to warps 256 at a time."""
    warps = -(-threads // 32)
    of_a_warp = -(-max(registers, 1) * 32 // 256) * 256
    return min(65536 // 4 // of_a_warp * 4, 2048 // 32) // warps


# ------------------------------------------------------------------------------------------------------------ compiling
def find_disassembler(toolkit: _build.Toolkit) -> Path | None:
    """The toolkit's cuobjdump, or the one that Triton brings along."""
    candidates = [toolkit.home / "bin" / "cuobjdump"]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    on_path = shutil.which("cuobjdump")
    return next((path for path in [*candidates, *([Path(on_path)] if on_path else [])] if path.exists()), None)


def known_newer(toolkit: _build.Toolkit) -> list[str]:
    known = {f"{major}.{minor}" for major, minor in toolkit.architectures}
    return [a for a in NEWER if a in known][:1]


@dataclass(frozen=True)
class Job:
    """One file on one architecture."""

    type: str  # bfloat16, ...: of all its kernels; or weights
    architecture: str
    step: _build.Step

    @property
    def sm(self) -> str:
        return "sm_" + self.architecture.replace(".", "")


@dataclass(frozen=True)
class Done:
    job: Job
    kernels: dict[str, Usage]
    seconds: float
    kept: bool


def plan(machine: _build.Machine, architectures: Iterable[str], types: Iterable[str]) -> list[Job]:
    wanted = set(types)
    jobs = []
    for architecture in architectures:
        decision = _build.Decision("cuda", "resources", architectures=(architecture,))
        work = WORK / architecture.replace(".", "")
        for step in _build.cuda_steps(machine, decision, ROOT / "csrc", work, os.environ):
            source = step.inputs[0]
            kernels = source.parent.name == "instances" or source.name == "weights.cu"
            if kernels and (not wanted or source.stem in wanted):
                jobs.append(Job(source.stem, architecture, step))
    return jobs


def _digests(depfile: Path) -> dict[str, str]:
    """Of our own files that an object was made from; a toolkit that changes changes the command."""
    words = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    own = sorted({Path(w).resolve() for w in words if "csrc" in Path(w).parts})
    return {path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in own}


def run(job: Job, disassembler: Path | None) -> Done:
    made = job.step.output
    made.parent.mkdir(parents=True, exist_ok=True)
    note = made.with_suffix(".json")
    command = [*job.step.command, "--resource-usage"]
    key = [shlex.join(command), str(disassembler)]
    try:
        kept = json.loads(note.read_text())
        if kept["key"] == key and kept["inputs"] == _digests(Path(f"{made}.d")):
            return Done(job, {name: Usage(*numbers) for name, numbers in kept["kernels"].items()}, kept["seconds"], True)
    except (OSError, ValueError, LookupError):
        pass
    note.unlink(missing_ok=True)
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode != 0:
        raise SystemExit(f"{job.type} for {job.sm} does not compile:\n{(done.stdout + done.stderr)[-3000:]}")
    inputs = _digests(Path(f"{made}.d"))
    kernels = _read(done.stdout + done.stderr, made, disassembler)
    numbers = {name: astuple(usage) for name, usage in kernels.items()}
    note.write_text(json.dumps({"key": key, "inputs": inputs, "seconds": seconds, "kernels": numbers}))
    return Done(job, kernels, seconds, False)


def _read(printed: str, made: Path, disassembler: Path | None) -> dict[str, Usage]:
    counts: dict[str, dict[str, int]] = {}
    if disassembler is not None:
        command = [str(disassembler), "--dump-sass", str(made)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            counts = count_instructions(process.stdout)
    found = {}
    for mangled, usage in parse_usage(printed).items():
        name = readable(mangled)
        if name is not None:
            found[name] = Usage(**{**asdict(usage), **counts.get(mangled, {})})
    return found


# -------------------------------------------------------------------------------------------------------------- writing
def spills(usage: Usage) -> bool:
    return bool(usage.spill_bytes or usage.stack_bytes or usage.local_accesses)


def allowed(name: str, sm: str, patterns: dict[str, str]) -> str | None:
    """The reason why a kernel may spill; patterns are of names, or of names with ``@sm_90``."""
    return next((why for p, why in patterns.items() if fnmatch.fnmatch(name, p) or fnmatch.fnmatch(f"{name} @{sm}", p)), None)


def read_baseline(path: Path = BASELINE) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    except (OSError, ValueError):
        return {"allowed": {}, "kernels": {}}


def usages(baseline: dict[str, Any]) -> Iterator[tuple[str, str, Usage]]:
    """(kernel, architecture, usage) of everything in a baseline."""
    for name, by_architecture in baseline["kernels"].items():
        for sm, numbers in by_architecture.items():
            yield name, sm, Usage(**dict(zip(baseline["columns"], numbers, strict=True)))


def differences(before: dict[str, Any], kernels: dict[str, dict[str, Usage]]) -> list[str]:
    """Of registers, spills and stack; what was not looked at now is not compared."""
    old = {(name, sm): usage for name, sm, usage in usages(before)} if before["kernels"] else {}
    lines = []
    for name, by_architecture in sorted(kernels.items()):
        for sm, usage in by_architecture.items():
            was = old.get((name, sm))
            if was is None:
                lines += [f"new: {name} @{sm}"] if old else []
                continue
            for column in ("registers", "spill_bytes", "stack_bytes"):
                a, b = getattr(was, column), getattr(usage, column)
                if a != b:
                    lines.append(f"{name} @{sm}: {column} {a} -> {b}")
    return lines


def write_json(kernels: dict[str, dict[str, Usage]], patterns: dict[str, str], about: dict[str, Any]) -> None:
    lines = [f'  "{key}": {json.dumps(value)},' for key, value in {**about, "columns": COLUMNS}.items()]
    lines.append(f'  "allowed": {json.dumps(patterns, indent=2)},'.replace("\n", "\n  "))
    rows = [
        f'    "{name}": {{{", ".join(f"{json.dumps(sm)}: {json.dumps(astuple(u))}" for sm, u in by_architecture.items())}}}'
        for name, by_architecture in sorted(kernels.items())
    ]
    BASELINE.write_text("\n".join(["{", *lines, '  "kernels": {', ",\n".join(rows), "  }", "}"]) + "\n")


def _range(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _share(found: list[Usage], part: str, whole: str) -> str:
    return f"{sum(getattr(u, part) for u in found)}/{sum(getattr(u, whole) for u in found)}" if found else ""


def rows_of(kernels: dict[str, dict[str, Usage]], sm: str) -> list[str]:
    """One row per kernel and type, those with the most registers and spills first."""
    groups: dict[tuple[str, str], list[tuple[str, Usage]]] = defaultdict(list)
    for name, by_architecture in kernels.items():
        if sm in by_architecture:
            groups[family(name), type_of(name)].append((name, by_architecture[sm]))
    keyed = []
    for (kernel, kind), members in groups.items():
        name, worst = max(members, key=lambda m: (m[1].spill_bytes, m[1].stack_bytes, m[1].registers))
        most = max(u.registers for _, u in members)
        usual = min(blocks_per_processor(u.registers, BLOCK) for _, u in members)
        largest = min(blocks_per_processor(u.registers, largest_block(n)) for n, u in members)
        sass = [u for _, u in members if u.instructions is not None]
        cells = [
            *(kernel, kind, str(len(members)), _range(u.registers for _, u in members), f"{usual}/{largest}"),
            *(str(sum(u.spill_bytes for _, u in members)), str(max(u.stack_bytes for _, u in members))),
            *(str(max(u.shared_bytes for _, u in members)), _share(sass, "wide_loads", "loads"), _share(sass, "wide_stores", "stores")),
            _range(u.instructions or 0 for u in sass) if sass else "",
            " ".join(name.split()[2:]),
        ]
        keyed.append(((-worst.spill_bytes, -worst.stack_bytes, -most, kernel, kind), "| " + " | ".join(cells) + " |"))
    return [row for _, row in sorted(keyed)]


HEADER = [
    f"| kernel | type | instances | registers | blocks of {BLOCK}/most threads | spilled bytes | stack | static shared bytes "
    "| 16-byte loads | 16-byte stores | instructions | worst instance |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
]


def table(kernels: dict[str, dict[str, Usage]], done: list[Done], toolkit: _build.Toolkit) -> str:
    architectures = list(dict.fromkeys(d.job.sm for d in done))
    lines = [
        "# CUDA kernels: registers, spills, width of accesses",
        "",
        f"Written by `make resources`, compiled with nvcc {toolkit.version}; no GPU took part. One row per kernel and type, over all its",
        "instances (views and activations); the worst first, named in the last column without kernel and type. Blocks: that fit one",
        f"processor as far as registers go, of {BLOCK} threads and of the most that the kernel is launched with; 2048 threads are full.",
        "Loads and stores: 16-byte ones of all that the machine code has for global memory, those of coefficients, tails and unaligned",
        "tensors included. cuda-resources.json has every instance and what may spill.",
        "",
        "| architecture | instances | most registers | that spill or have a stack | 16-byte loads | compile seconds, a file each |",
        "|---|---|---|---|---|---|",
    ]
    for sm in architectures:
        found = [by_architecture[sm] for by_architecture in kernels.values() if sm in by_architecture]
        times = ", ".join(f"{d.job.type} {d.seconds:.0f}" for d in done if d.job.sm == sm)
        wide, every = sum(u.wide_loads or 0 for u in found), sum(u.loads or 0 for u in found)
        most = max(u.registers for u in found)
        lines.append(f"| {sm} | {len(found)} | {most} | {sum(map(spills, found))} | {wide}/{every} | {times} |")
    for sm in architectures:
        lines += ["", f"## {sm}", "", *HEADER, *rows_of(kernels, sm)]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------------ main
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="*", default=[], help="8.0 9.0 ...: only these, and nothing is written")
    parser.add_argument("--types", nargs="*", default=[], help="float32 bfloat16 ...: only these, and nothing is written")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    machine = _build.survey()
    if machine.toolkit is None or machine.torch is None or machine.compiler is None:
        print("cuda_resources: needs nvcc, g++ and torch: the CUDA kernels are not looked at", file=sys.stderr)
        return 1
    disassembler = find_disassembler(machine.toolkit)
    if disassembler is None:
        print("cuda_resources: no cuobjdump in the toolkit or with Triton: machine code is not counted", file=sys.stderr)
    architectures = options.arch or [*ARCHITECTURES, *known_newer(machine.toolkit)]
    jobs = plan(machine, architectures, options.types)
    done = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for d in pool.map(lambda job: run(job, disassembler), jobs):
            print(f"{d.job.sm} {d.job.type}: {len(d.kernels)} kernels, {'unchanged' if d.kept else f'{d.seconds:.0f} s'}", flush=True)
            done.append(d)
    kernels: dict[str, dict[str, Usage]] = defaultdict(dict)
    for d in done:
        for name, usage in d.kernels.items():  # kernels of the accumulator's type come with every type that has it
            kernels[name][d.job.sm] = usage
    before = read_baseline()
    changed = differences(before, kernels)
    print("\n".join(changed) or "as in the baseline", flush=True)
    patterns: dict[str, str] = before["allowed"]
    text = table(kernels, done, machine.toolkit)
    if options.arch or options.types:
        print("\n" + text)
    else:
        RESULTS.mkdir(parents=True, exist_ok=True)
        looked_at = list(dict.fromkeys(job.sm for job in jobs))
        write_json(kernels, patterns, {"nvcc": machine.toolkit.version, "architectures": looked_at})
        TABLE.write_text(text)
        print(f"{TABLE.relative_to(ROOT)}, {BASELINE.relative_to(ROOT)}")
    bad = [f"{n} @{sm}" for n, found in kernels.items() for sm, u in found.items() if spills(u) and allowed(n, sm, patterns) is None]
    if bad:
        print(f"{len(bad)} spill and are not allowed to:\n  " + "\n  ".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
