"""``python -m bench.gpu.counters``: bytes that the kernels move to and from DRAM, by ncu, beside the bytes that must move.

ncu runs this file again with ``--child``, which puts a marker kernel (torch's spin_kernel) before each direction of each case. Caches
are emptied before every kernel (ncu's default), so what a second kernel finds in the cache of the first does not show here.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from normfused.benchmark import timing, traffic
from normfused.benchmark.cases import CHANNELS_LAST, Case
from normfused.benchmark.providers import all_providers, prepare

from .facts import save

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
UNITS = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6, "nsecond": 1e-3, "usecond": 1.0}
MARKER = "spin_kernel"
DIRECTIONS = ("forward", "backward")
CASES = [
    Case("batch", (32, 256, 28, 28), "relu", residual="pre_act"),
    Case("batch", (32, 256, 28, 28), "relu", residual="pre_act", layout=CHANNELS_LAST),
    Case("batch", (32, 256, 56, 56), "relu"),
    Case("group", (8, 320, 64, 64), "silu", groups=32),
    Case("group", (8, 320, 64, 64), "silu", groups=32, layout=CHANNELS_LAST),
    Case("instance", (8, 256, 64, 64), "relu"),
    Case("layer", (25088, 384)),
    Case("layer", (32, 96, 56, 56), dim=1),
    Case("rms", (8192, 4096), residual="pre_norm"),
]


def child(provider_name: str) -> int:
    (provider,) = (p for p in all_providers("cuda") if p.name == provider_name)
    if provider.absent is not None:
        print(provider.absent)
        return 1
    for case in CASES:
        module = prepare(provider, case, "cuda")
        (given,) = timing.inputs(case, "cuda", sets=1)
        wanted = [*given.leaves, *module.parameters()]
        for profiled in (False, True):
            torch.cuda.synchronize()
            if profiled:
                torch.cuda.profiler.start()
                torch.cuda._sleep(1)
            out = module(*given.leaves)
            heads = out if isinstance(out, tuple) else (out,)
            if profiled:
                torch.cuda._sleep(1)
            torch.autograd.grad(heads, wanted, given.gradients[: len(heads)])
            torch.cuda.synchronize()
            if profiled:
                torch.cuda.profiler.stop()
    return 0


def parse(text: str) -> list[dict[str, Any]]:
    """Kernels in the order of their launches: name, read, written (bytes), us."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[start:]):
        name = row.get("Metric Name")
        if name not in METRICS:
            continue
        full = row["Kernel Name"]
        kernel = MARKER if MARKER in full else re.sub(r"^void |\(.*$|normfused::", "", full)
        entry = kernels.setdefault(row["ID"], {"kernel": kernel})
        value = float(row["Metric Value"].replace(",", "")) * UNITS.get(row["Metric Unit"], float("nan"))
        entry[("read", "written", "us")[METRICS.index(name)]] = value
    return list(kernels.values())


def by_direction(kernels: list[dict[str, Any]], cases: list[Case]) -> list[dict[str, Any]]:
    """One entry per case and direction, from the kernels between the markers."""
    groups: list[list[dict[str, Any]]] = []
    for kernel in kernels:
        if kernel["kernel"] == MARKER:
            groups.append([])
        elif groups:
            groups[-1].append(kernel)
    expected = [(case, direction) for case in cases for direction in DIRECTIONS]
    if len(groups) != len(expected):
        raise ValueError(f"{len(groups)} groups of kernels for {len(expected)} directions of {len(cases)} cases")
    found = []
    for (case, direction), group in zip(expected, groups, strict=True):
        floor = traffic.floor_bytes(case, direction, "training")
        moved = sum(k.get("read", 0.0) + k.get("written", 0.0) for k in group)
        found.append(
            {"case": case.name, "direction": direction, "floor": floor, "moved": moved, "of_floor": moved / floor, "kernels": group}
        )
    return found


def markdown(found: list[dict[str, Any]]) -> str:
    lines = [
        "## DRAM bytes, by ncu",
        "",
        "Caches emptied before each kernel. Writes that are still in the cache when a kernel ends are not in its bytes.",
        "",
        "| case | direction | MB that must move | MB moved | ratio | kernels: MB read + written |",
        "|---|---|---|---|---|---|",
    ]
    for f in found:
        kernels = ", ".join(
            f"{k['kernel'].split('<')[0].removesuffix('_kernel')} {k.get('read', 0) / 1e6:.1f} + {k.get('written', 0) / 1e6:.1f}"
            for k in f["kernels"]
        )
        row = f"| {f['case']} | {f['direction']} | {f['floor'] / 1e6:.1f} | {f['moved'] / 1e6:.1f} | {f['of_floor']:.2f} | {kernels} |"
        lines.append(row)
    return "\n".join(lines)


def why_not(text: str) -> str:
    """ncu's own words, the first of them."""
    found = re.search(r"==(?:ERROR|WARNING)==\s*(.+)", text) or re.search(r"(?i)^.*(?:error|failed).*$", text, re.MULTILINE)
    return (found[1] if found is not None and found.lastindex else found[0] if found is not None else "it wrote no kernels").strip()[:160]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--provider", default="normfused-cuda")
    parser.add_argument("--child", action="store_true")
    options = parser.parse_args()
    if options.child:
        return child(options.provider)
    ncu = shutil.which("ncu") or next((p for p in ("/usr/local/cuda/bin/ncu",) if Path(p).exists()), None)
    if ncu is None:
        print("headline: not measured: there is no ncu")
        return 0
    work = Path(os.environ.get("RESULT_FILE", "build/gpu/ncu.json")).resolve().parent
    work.mkdir(parents=True, exist_ok=True)
    report = work / "ncu-kernels.txt"
    report.unlink(missing_ok=True)
    command = [
        *(ncu, "--target-processes", "all", "--profile-from-start", "off", "--clock-control", "none", "--csv"),
        *("--print-units", "base", "--metrics", ",".join(METRICS), "--log-file", str(report)),
        *(sys.executable, "-m", "bench.gpu.counters", "--child", "--provider", options.provider),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    text = report.read_text(errors="replace") if report.exists() else ""
    print(done.stdout[-4000:])
    kernels = parse(text)
    if not kernels:
        print(f"headline: not measured: {why_not(text + done.stdout)}")
        return 0
    try:
        found = by_direction(kernels, CASES)
    except ValueError as error:
        save({"kernels": kernels})
        print(f"headline: {error}")
        return 1
    print(markdown(found))
    save({"cases": found, "markdown": markdown(found)})
    single = [f["of_floor"] for f in found if len(f["kernels"]) == 1]
    print(
        f"headline: {len(found)} directions; of one kernel: {len(single)}" + (f", at most {max(single):.2f} of the floor" if single else "")
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
