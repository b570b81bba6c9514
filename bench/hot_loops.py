"""``python -m bench.hot_loops``: instructions that the two loops of a single pass issue for an element, from machine code, without a GPU.

A kernel bound by memory must not spend more instructions than the memory leaves time for. Counted is, in the code for sm_90, the shortest
way round the loop that sums and round the loop that writes on which all arithmetic of a batch is done: that of whole vectors that are
there, without residual or mask. Predicated instructions count, since they are issued. What is left out: the loops for the ragged ends of
rows, latencies, and what is done once a slab.

Uses the objects of bench.cuda_resources (and compiles what is not there). Writes bench/results/hot-loops.md, to be read, and
hot-loops.json, which tests/cuda/test_hot_loops.py holds the kernels to; under "above" are kernels that need more than memory allows,
with a reason.
"""

from __future__ import annotations

import heapq
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from normfused import _build

from . import cuda_resources as resources

BASELINE = resources.RESULTS / "hot-loops.json"
TABLE = resources.RESULTS / "hot-loops.md"
# An H200's data sheet: instructions for a lane and second, bytes a second
LANES, BANDWIDTH = 132 * 128 * 1.98e9, 4.8e12
SIZES = {"fp16": 2, "bf16": 2, "fp32": 4}
TENSORS = {"single_pass": 2, "grad_single_pass": 3}  # that must be read or written


# -------------------------------------------------------------------------------------------------------------- reading
@dataclass(frozen=True)
class Instruction:
    name: str  # LDG.E.128
    target: int | None = None  # of a branch: a place in the function
    falls_through: bool = True  # or not always taken


_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def functions(lines: Iterable[str]) -> Iterator[tuple[str, list[Instruction]]]:
    """(mangled name, code) of every function that cuobjdump --dump-sass prints."""
    name, found = "", []
    for line in lines:
        if "Function :" in line:
            if name:
                yield name, _linked(found)
            name, found = line.split(":", 1)[1].strip(), []
        elif match := _LINE.match(line):
            found.append(match.groups())
    if name:
        yield name, _linked(found)


def _linked(lines: list[tuple[str, str | None, str, str]]) -> list[Instruction]:
    places = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    code = []
    for _, guard, name, operands in lines:
        kind, target = name.split(".")[0], None
        if kind == "BRA" and (address := re.search(r"0x([0-9a-f]+)", operands)):
            target = places.get(int(address[1], 16))
        leaves = kind in ("BRA", "BRX", "EXIT", "RET", "CALL", "JMP", "BREAK", "KILL")  # a call is a slow path of arithmetic
        conditional = guard is not None or (kind == "BRA" and re.match(r"\s*!?U?P\w", operands) is not None)
        code.append(Instruction(name, target, not leaves or (conditional and kind != "CALL") or kind == "BREAK"))
    return code


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """(first, last instruction) of every loop, the smallest first."""
    found = [(at.target, i) for i, at in enumerate(code) if at.target is not None and at.target <= i]
    return sorted(found, key=lambda loop: loop[1] - loop[0])


def count(code: list[Instruction], loop: tuple[int, int], name: str) -> int:
    return sum(at.name.startswith(name) for at in code[loop[0] : loop[1] + 1])


def shortest_way(code: list[Instruction], loop: tuple[int, int], need: dict[str, int]) -> int | None:
    """Instructions of the shortest way round a loop on which at least so many are issued whose names begin so; None: there is none."""
    head, tail = loop
    kinds = list(need)
    waiting = [(0, head, (0,) * len(kinds))]
    seen = set()
    while waiting:
        issued, place, had = heapq.heappop(waiting)
        if (place, had) in seen:
            continue
        seen.add((place, had))
        at = code[place]
        had = tuple(min(need[kind], n + at.name.startswith(kind)) for kind, n in zip(kinds, had, strict=True))
        if place == tail:
            if all(n == need[kind] for kind, n in zip(kinds, had, strict=True)):
                return issued + 1
            continue
        following = {at.target} if at.target is not None and at.target > place else set()
        if at.falls_through:
            following.add(place + 1)
        for there in following:
            if head <= there <= tail:
                heapq.heappush(waiting, (issued + 1, there, had))
    return None


# ------------------------------------------------------------------------------------------------------------- counting
def constants() -> dict[str, int]:
    """Vectors that a thread holds at a time, by kernel."""
    source = (resources.ROOT / "csrc" / "kernels" / "call.h").read_text()
    found = dict(re.findall(r"(forward_batch|gradient_batch) = (\d+)", source))
    return {"single_pass": int(found["forward_batch"]), "grad_single_pass": int(found["gradient_batch"])}


def looked_at(name: str) -> bool:
    """Sets wide along rows and narrow along columns, which are whole networks; activations that have code of their own."""
    kernel, kind, *rest = name.split()
    return kernel in TENSORS and kind in SIZES and rest[0] in ("wide/rows", "narrow/columns") and rest[1] in ("identity", "relu", "silu")


def needs(kernel: str, act: str, elements: int, vectors: int) -> tuple[dict[str, int], dict[str, int]]:
    """What must be issued for a batch: by the loop that sums, and by the loop that writes."""
    of_act = act != "identity"
    exponentials = {"MUFU": 2 * elements} if act == "silu" else {}
    if kernel == "single_pass":
        # x less its centre, the sum, the square; x less the mean, scale and shift
        return (
            {"FADD": 2 * elements, "FFMA": elements, "LDS.128": vectors, "LDGSTS": vectors},
            {"FADD": elements, "FFMA": elements, "LDS.128": vectors, "STG.E": vectors, **exponentials},
        )
    # x less the mean, (z,) the two sums; x less the mean, (z,) q*x + r and scale*dz
    return (
        {"FADD": 2 * elements, "FFMA": (1 + of_act) * elements, "LDS.128": 2 * vectors, "LDGSTS": 2 * vectors, **exponentials},
        {"FADD": elements, "FFMA": (2 + of_act) * elements, "LDS.128": 2 * vectors, "STG.E": vectors, **exponentials},
    )


def count_loops(name: str, code: list[Instruction], batch: int) -> tuple[float, float]:
    """Instructions for an element in the loop that sums and in the one that writes."""
    kernel, kind, _, act = name.split()[:4]
    elements = batch * 16 // SIZES[kind]
    summing, writing = needs(kernel, act, elements, batch)

    def least(need: dict[str, int], fits: Any) -> float:
        for loop in loops(code):
            if fits(loop) and all(count(code, loop, kind) >= n for kind, n in need.items()):
                way = shortest_way(code, loop, need)
                if way is not None:
                    return round(way / elements, 1)
        raise ValueError(f"{name}: no loop does {need}")

    first = least(summing, lambda loop: count(code, loop, "STG.E") == 0 or kernel == "grad_single_pass")
    return first, least(writing, lambda loop: count(code, loop, "LDGSTS") == 0)


def allowed(name: str) -> float:
    """Instructions for an element that an H200 can issue while its memory moves it."""
    kernel, kind = name.split()[:2]
    return LANES / (BANDWIDTH / (TENSORS[kernel] * SIZES[kind]))


def find() -> dict[str, tuple[float, float]]:
    machine = _build.survey()
    if machine.toolkit is None or machine.torch is None or machine.compiler is None:
        raise SystemExit("hot_loops: needs nvcc, g++ and torch")
    disassembler = resources.find_disassembler(machine.toolkit)
    if disassembler is None:
        raise SystemExit("hot_loops: needs cuobjdump, of the toolkit or of Triton")
    batches, found = constants(), {}
    for job in resources.plan(machine, ["9.0"], ["bfloat16", "float16", "float32"]):
        resources.run(job, disassembler)
        with subprocess.Popen(
            [str(disassembler), "--dump-sass", str(job.step.output)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            for mangled, code in functions(process.stdout):
                name = resources.readable(mangled)
                if name is not None and looked_at(name):
                    found[name] = count_loops(name, code, batches[name.split()[0]])
                    print(name, *found[name], flush=True)
    return dict(sorted(found.items()))


# -------------------------------------------------------------------------------------------------------------- writing
def read_baseline() -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(BASELINE.read_text())
        return found
    except (OSError, ValueError):
        return {"above": {}, "kernels": {}}


def table(found: dict[str, tuple[float, float]]) -> str:
    lines = [
        "# Instructions for an element",
        "",
        "Written by `python -m bench.hot_loops` from the machine code for sm_90; no GPU took part. The loop that sums and the loop that",
        "writes of a single pass, whole vectors, no residual and no mask. Allowed: what 132 processors x 128 lanes x 1.98 GHz issue while",
        f"{BANDWIDTH / 1e12:.1f} TB/s of memory (an H200's data sheet) move the element's 2 numbers forward and 3 backward.",
        "",
        "| kernel | sums | writes | together | allowed | share |",
        "|---|---|---|---|---|---|",
    ]
    for name, (first, second) in found.items():
        together, most = first + second, allowed(name)
        lines.append(f"| {name} | {first:.1f} | {second:.1f} | {together:.1f} | {most:.0f} | {together / most:.0%} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    found = find()
    above: dict[str, str] = read_baseline()["above"]
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in found.items())
    reasons = json.dumps(above, indent=2).replace("\n", "\n  ")
    BASELINE.write_text(f'{{\n  "architecture": "sm_90",\n  "above": {reasons},\n  "kernels": {{\n{rows}\n  }}\n}}\n')
    TABLE.write_text(table(found))
    print(table(found))
    bad = [name for name, numbers in found.items() if sum(numbers) > allowed(name) and name not in above]
    if bad:
        print("above what memory allows, and not named: " + ", ".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
