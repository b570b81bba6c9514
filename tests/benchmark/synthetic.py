"""Rows as a GPU's or a CPU's run would give them, made up: they are in no results file and say nothing of any device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from normfused.benchmark.cases import MATRIX, QUICK, Case
from normfused.benchmark.results import MODES, PASSES, NetworkRow, OperatorRow, Results
from normfused.benchmark.traffic import floor_bytes

COPY = 4000.0  # GB/s
GPU = {
    "device": "cuda",
    "machine": "NVIDIA Imaginary",
    "torch": "2.11.0",
    "versions": {"torch": "2.11.0", "normfused": "0.1.0"},
    "driver": "0.0",
    "commit": "abc1234",
    "date": "2026-01-02 03:04 UTC",
    "copy_gbps": COPY,
    "options": {"quick": False},
}
CPU = {
    "device": "cpu",
    "machine": "Imaginary CPU",
    "torch": "2.10.0",
    "commit": "abc1234",
    "date": "2026-01-02 03:04 UTC",
    "copy_gbps": 20.0,
}
# of the copy rate, by provider
SPEEDS = {"eager": 0.3, "compile": 0.5, "compile-max-autotune": 0.45, "liger": 0.6, "normfused-cuda": 0.96, "normfused-triton": 0.7}


def row(
    case: Case, direction: str, provider: str, of_copy: float, header: dict[str, Any] = GPU, mode: str = "training", **more: Any
) -> OperatorRow:
    """A row whose time moves the bytes that must move at ``of_copy`` of the copy rate."""
    size = floor_bytes(case, direction, mode)
    us = size / (of_copy * header["copy_gbps"] * 1e3)
    ours = provider.startswith("normfused")
    given: dict[str, Any] = {
        "bytes_min": size,
        "gbps": of_copy * header["copy_gbps"],
        "pct_copy": 100 * of_copy,
        "host_us": 6.0 if ours else 20.0,
        "launches": 1 if ours else 4,
        "peak_bytes": (1 if ours else 2) * case.tensor_bytes,
        "saved_bytes": (1 if ours else 2) * case.tensor_bytes,
        "max_err": 0.002 if ours else 0.004,
        "err_of_allowed": 0.25 if ours else 0.5,
        "route": "single_pass" if ours else None,
        "spread": 0.01,
    }
    given |= {"host_us": us} if header["device"] == "cpu" else {"device_us": us, "device_warm_us": min(us, 3.5)}
    return OperatorRow(
        case.name,
        case.family,
        case.norm,
        case.act,
        case.residual,
        case.shape,
        case.layout,
        str(case.dtype).removeprefix("torch."),
        mode,
        direction,
        provider,
        **given | more,
    )  # fmt: skip


def networks(factor: float = 1.3) -> list[NetworkRow]:
    """With torch.nn's norms a step of 100 ms, with normfused's ``factor`` times as fast."""
    found = []
    for name, batch in (("resnet50", 256), ("nnunet", 2), ("diffusion_unet", 1), ("efficientnet_b0", 128)):
        for execution, base in (("eager", 100.0), ("compile", 80.0)):
            for norms, ms in (("torch.nn", base), ("normfused", base / factor)):
                shape, layout = (batch, 3, 224, 224), "channels_last_3d" if name == "nnunet" else "channels_last"
                peak = 20_000_000_000 if norms == "torch.nn" else 15_000_000_000
                figures: dict[str, Any] = {"step_ms": ms, "images_per_s": batch / ms * 1e3, "peak_bytes": peak, "replaced": 53}
                found.append(NetworkRow(name, batch, shape, layout, "bfloat16", "training", norms, execution, backend="cuda", **figures))
    return found


def gpu(cases: Iterable[Case] = MATRIX, **speeds: float) -> Results:
    """All passes of the cases, in training, by made-up providers; ``speeds`` replaces shares of the copy rate (normfused_cuda=0.5)."""
    shares = SPEEDS | {name.replace("_", "-"): share for name, share in speeds.items()}
    rows = [row(c, d, p, share) for c in cases for d in PASSES for p, share in shares.items()]
    return Results(dict(GPU), rows, networks(), {"apex": "apex: not installed"}, [])


def cpu() -> Results:
    shares = {"eager": 0.3, "compile": 0.35, "normfused-torch": 0.32}
    rows = [
        row(c, d, p, share * (0.8 if p.startswith("n") and i % 3 == 0 else 1.1), CPU, m, peak_bytes=None, launches=None, route=None)
        for i, c in enumerate(QUICK)
        for d in PASSES
        for m in MODES[:1]
        for p, share in shares.items()
    ]
    return Results(dict(CPU), rows, [], {"normfused-cuda": "no CUDA GPU is visible to torch"}, [])
