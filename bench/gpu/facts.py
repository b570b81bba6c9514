"""``python -m bench.gpu.facts``: what the machine is, and the rates that all other figures are quoted against."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch

import normfused as nf
from normfused import _build, dispatch
from normfused.benchmark import header
from normfused.benchmark.timing import CALLS, ROUNDS, Call, captured, copy_rate, host_us, repeated, side_stream, take_turns

MIB = 2**20


def save(result: dict[str, Any]) -> None:
    """For the record that the stage's runner keeps."""
    path = os.environ.get("RESULT_FILE")
    if path:
        Path(path).write_text(json.dumps(result, indent=1, default=str))


def device_seconds(call: Call, times: int) -> float:
    """Median of one of ``times`` calls in a CUDA graph, by events."""
    return 1e-6 * statistics.median(take_turns({"": captured(call, times).us}, ROUNDS)[""])


def host_seconds(call: Call) -> float:
    """Median of what the host spends to issue a call."""
    for _ in range(3):
        call()
    return 1e-6 * statistics.median(take_turns({"": partial(host_us, repeated(call, CALLS), CALLS)}, 10)[""])


def copy_gbps(size: int, sets: int | None = None) -> float:
    return copy_rate("cuda", size, sets) / 1e9


def measured() -> dict[str, Any]:
    copies = {f"copy_gbps_{size // MIB}mib": round(copy_gbps(size)) for size in (4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)}
    tiny = torch.zeros(32, device="cuda")
    big = torch.zeros(2**20, device="cuda")
    torch.cuda.synchronize()
    found: dict[str, Any] = {**copies, "copy_gbps_in_cache_8mib": round(copy_gbps(8 * MIB, sets=1))}
    # dependent launches in a graph, back to back
    found["launch_in_graph_us"] = round(1e6 * device_seconds(lambda: tiny.add_(1), 100), 2)
    found["launch_in_graph_4mib_us"] = round(1e6 * device_seconds(lambda: big.add_(1), 100), 2)

    def waited() -> None:
        tiny.add_(1)
        torch.cuda.synchronize()

    found["launch_and_wait_us"] = round(1e6 * host_seconds(waited), 2)
    found["host_eager_add_us"] = round(1e6 * host_seconds(lambda: tiny.add_(1)), 2)
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

        costs[f"host_forward_us {name}"] = round(1e6 * host_seconds(once), 1) if device == "cuda" else 0.0
    return costs


def versions() -> dict[str, Any]:
    """Of the tools that the other stages need; the header has the rest."""
    found: dict[str, Any] = {}
    for name in ("pytest", "pytest_benchmark", "hypothesis", "xdist", "setuptools", "pybind11", "ninja"):
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
    result: dict[str, Any] = {"labels": header.header(device), "versions": versions()}
    limits = ("memory.total", "clocks.max.sm", "clocks.max.mem", "power.limit", "persistence_mode", "mig.mode.current")
    result["nvidia_smi"] = header.nvidia_smi(*limits)
    result["backends"] = {b: dispatch.unavailable(b, device, torch.float32) or "ready" for b in ("cuda", "triton", "torch")}
    if device == "cuda":
        with side_stream(device):
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
