"""``python -m bench.gpu.facts``: what the machine is, and the rates that all other figures are quoted against."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import normfused as nf
from normfused import _build, dispatch
from normfused.benchmark.timing import COLD_BYTES, graphed, host_seconds

from ..conftest import labels

MIB = 2**20


def save(result: dict[str, Any]) -> None:
    """For the record that the stage's runner keeps."""
    path = os.environ.get("RESULT_FILE")
    if path:
        Path(path).write_text(json.dumps(result, indent=1, default=str))


def about(device: str) -> dict[str, Any]:
    """bench.conftest.labels, also where there is no git."""
    try:
        return labels(device)
    except OSError:
        gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
        return {"device": device, "torch": torch.__version__, "normfused": nf.__version__, "commit": None, **gpu}


def seconds_on_device(call: Callable[[], object], times: int, rounds: int = 7) -> float:
    """Median of one of ``times`` calls in a CUDA graph, by events."""
    replay, _ = graphed(call, times)
    replay()
    found = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / times)
    return statistics.median(found)


def copy_gbps(size: int, sets: int | None = None) -> float:
    """Bytes read and written a second by torch's copy of ``size`` bytes, rotating over more memory than the cache (or ``sets``)."""
    sets = sets or max(2, -(-COLD_BYTES // (2 * size)))
    # random bits: equal ones cost less power and so run at a higher clock
    sources = [torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda") for _ in range(sets)]
    targets = [torch.empty_like(s) for s in sources]
    turn = iter(range(10**9))

    def copy() -> None:
        k = next(turn) % sets
        targets[k].copy_(sources[k])

    return 2 * size / seconds_on_device(copy, max(sets, 20)) / 1e9


def measured() -> dict[str, Any]:
    copies = {f"copy_gbps_{size // MIB}mib": round(copy_gbps(size)) for size in (4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)}
    tiny = torch.zeros(32, device="cuda")
    big = torch.zeros(2**20, device="cuda")
    torch.cuda.synchronize()
    found: dict[str, Any] = {**copies, "copy_gbps_in_cache_8mib": round(copy_gbps(8 * MIB, sets=1))}
    # dependent launches in a graph, back to back
    found["launch_in_graph_us"] = round(1e6 * seconds_on_device(lambda: tiny.add_(1), 100), 2)
    found["launch_in_graph_4mib_us"] = round(1e6 * seconds_on_device(lambda: big.add_(1), 100), 2)

    def waited() -> None:
        tiny.add_(1)
        torch.cuda.synchronize()

    found["launch_and_wait_us"] = round(1e6 * host_seconds(waited, 200), 2)
    found["host_eager_add_us"] = round(1e6 * host_seconds(lambda: tiny.add_(1), 200), 2)
    return found


def host_costs(device: str) -> dict[str, float]:
    """What the host spends on a call: of this library's backends and of the chain that they replace."""
    x = torch.randn(8, 64, 8, 8, device=device, requires_grad=True)
    chain = torch.nn.Sequential(torch.nn.BatchNorm2d(64), torch.nn.ReLU()).to(device)
    found = {"nn chain": chain}
    for backend in ("cuda", "triton", "torch"):
        if dispatch.unavailable(backend, device, x.dtype) is None:
            found[backend] = nf.BatchNormAct2d(64, act="relu", backend=backend).to(device)
    costs = {}
    for name, layer in found.items():

        def once(layer: torch.nn.Module = layer) -> None:
            layer(x)

        for _ in range(5):
            once()
        costs[f"host_forward_us {name}"] = round(1e6 * host_seconds(once, 200), 1) if device == "cuda" else 0.0
    return costs


def versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in ("triton", "numpy", "pytest", "pytest_benchmark", "hypothesis", "xdist", "setuptools", "pybind11", "ninja", "timm"):
        if importlib.util.find_spec(name) is None:
            found[name] = None
            continue
        try:
            found[name] = getattr(__import__(name), "__version__", "present")
        except Exception as error:
            found[name] = f"does not import: {type(error).__name__}"
    toolkit = _build.find_toolkit()
    found["nvcc"] = toolkit.version if toolkit is not None else None
    found |= {tool: shutil.which(tool) is not None for tool in ("ncu", "compute-sanitizer", "cuobjdump")}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    result: dict[str, Any] = {"labels": about(device), "versions": versions()}
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,persistence_mode,mig.mode.current"
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True, check=False, timeout=30
        )
        result["nvidia_smi"] = done.stdout.splitlines()
    result["backends"] = {b: dispatch.unavailable(b, device, torch.float32) or "ready" for b in ("cuda", "triton", "torch")}
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        result["device"] = {"processors": p.multi_processor_count, "l2_mib": p.L2_cache_size / MIB, "memory_gib": p.total_memory / 2**30}
        result["measured"] = measured()
    result["host"] = host_costs(device)
    print(json.dumps(result, indent=1, default=str))
    save(result)
    rates = result.get("measured", {})
    not_ready = [b for b, state in result["backends"].items() if state != "ready"]
    print(
        f"headline: copy {rates.get('copy_gbps_256mib', '?')} GB/s, launch in a graph {rates.get('launch_in_graph_us', '?')} us"
        + (f"; not ready: {', '.join(not_ready)}" if not_ready else "")
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
