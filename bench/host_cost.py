"""Time on the host of an eager call of the CUDA backend with its launches left out, beside the torch.nn chain it replaces.

Runs without a GPU: ``make host-cost`` loads the emulated library and tells it to return from every launch at once. What is left is what
a GPU's host spends: the layer, the checks, dispatch, autograd, the operator, the plan, allocations. The chain's figures contain its own
(tiny) arithmetic on the CPU, a few elements only. Interleaved, medians, of the thread's own CPU time.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ["NORMFUSED_EMULATE"] = "1"

import torch
from torch import nn

import normfused as nf
from normfused.backends.cuda import _load


def _time(call: Callable[[], Any], count: int = 400) -> float:
    start = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - start) / count * 1e6


def _pair(ours: nn.Module, chain: nn.Module, x: torch.Tensor) -> dict[str, tuple[float, float]]:
    def backward(layer: nn.Module) -> Callable[[], Any]:
        dy = torch.ones_like(x)

        def run() -> None:
            torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

        return run

    rows: dict[str, tuple[float, float]] = {}
    for name, calls in (
        ("forward, grad on", (lambda: ours(x), lambda: chain(x))),
        ("forward + backward", (backward(ours), backward(chain))),
    ):
        for call in calls:
            _time(call, 50)
        samples = [[_time(call) for call in calls] for _ in range(15)]
        rows[name] = tuple(statistics.median(s[i] for s in samples) for i in range(2))  # type: ignore[assignment]
    return rows


def main() -> None:
    torch.set_num_threads(1)
    library = _load.library()
    if library is None:
        raise SystemExit(f"host-cost: {_load.reason()}")
    c = ctypes.CDLL(str(library.path))
    x = torch.randn(2, 8, 4, 4).requires_grad_()
    cases = {
        "BatchNorm2d + ReLU": (nf.BatchNormAct2d(8, act="relu", backend="cuda"), nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())),
        "GroupNorm + SiLU": (nf.GroupNormAct(2, 8, act="silu", backend="cuda"), nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())),
        "InstanceNorm2d + LeakyReLU": (
            nf.InstanceNormAct2d(8, affine=True, act="leaky_relu", backend="cuda"),
            nn.Sequential(nn.InstanceNorm2d(8, affine=True), nn.LeakyReLU()),
        ),
        "LayerNorm + GELU": (nf.LayerNormAct(4, act="gelu", backend="cuda"), nn.Sequential(nn.LayerNorm(4), nn.GELU())),
        "RMSNorm": (nf.RMSNormAct(4, backend="cuda"), nn.RMSNorm(4)),
    }
    print(f"torch {torch.__version__}, one thread, us of CPU time\n")
    print("| layer | call | normfused, launch left out | torch.nn chain |\n|---|---|---|---|")
    for name, (ours, chain) in cases.items():
        ours(x)
        c.nf_emulation_launches(0)
        try:
            rows = _pair(ours, chain, x)
        finally:
            c.nf_emulation_launches(1)
        for call, (a, b) in rows.items():
            print(f"| {name} | {call} | {a:.1f} | {b:.1f} |")


if __name__ == "__main__":
    main()
