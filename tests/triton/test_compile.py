"""Compiles what the host code launches for sm_80 and sm_90, without a GPU: it compiles, nothing spills, and what streams is wide.

NORMFUSED_WRITE_RESOURCES=1 also writes the table bench/results/triton-resources.md.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from normfused.activations import ACTIVATIONS, parse
from normfused.backends import triton as backend
from normfused.backends.triton.plan import Limits, forced
from normfused.problem import BATCH_INSTANCE, CHANNEL, MEAN_ONLY, NHWC, POSITION, PRE_NORM, RENORM, RMS, SAMPLE_GROUP, STANDARD, Problem

pytest.importorskip("triton")
from .compiled import Compiled, Launch, compile_launch, recorded

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on"), reason="the interpreter does not compile"
)

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
RESOURCES = Path(__file__).parents[2] / "bench" / "results" / "triton-resources.md"
# what moves the large tensors; the rest works on partial sums
STREAMING = ("moments", "apply", "grad_moments", "grad_apply", "single_pass", "grad_single_pass", "positions", "grad_positions")
H200 = Limits()


def call(
    scope: str, shape: tuple[int, ...], act: str = "identity", dtype: torch.dtype = BF16, *, rule: str = STANDARD, groups: int = 1,
    layout: str = "nchw", residual: str | None = None, route: str | None = None, tracked: bool = False, given: bool = False,
    rule_weight: bool = False, momentum: float | None = 0.1,
) -> dict[str, Any]:  # fmt: skip
    return dict(locals())


CALLS = {
    # batch norm: networks' layers
    "bn+add+relu 256@56 b32": call(CHANNEL, (32, 256, 56, 56), "relu", residual="pre_act", tracked=True),
    "bn+add+relu 256@56 b32 nhwc": call(CHANNEL, (32, 256, 56, 56), "relu", residual="pre_act", tracked=True, layout=NHWC),
    "bn+silu 96@112 b8": call(CHANNEL, (8, 96, 112, 112), "silu", tracked=True, momentum=None),
    "bn+silu 96@112 b8 nhwc fp32": call(CHANNEL, (8, 96, 112, 112), "silu", FP32, layout=NHWC, tracked=True),
    "bn+relu 512@14 b32, on chip": call(CHANNEL, (32, 512, 14, 14), "relu", tracked=True),
    "bn+add+silu 512@7 b128, on chip": call(CHANNEL, (128, 512, 7, 7), "silu", residual="pre_act", tracked=True),
    "bn+relu 512@7 b256": call(CHANNEL, (256, 512, 7, 7), "relu"),
    "bn+add+gelu 512@14 b32, on chip": call(CHANNEL, (32, 512, 14, 14), "gelu", residual="pre_act"),
    "bn1d+relu 1024 b256, on chip": call(CHANNEL, (256, 1024), "relu", tracked=True),
    "bn+relu 256@56 b32 fp32": call(CHANNEL, (32, 256, 56, 56), "relu", FP32),
    "bn+relu 64@32 b8 fp64": call(CHANNEL, (8, 64, 32, 32), "relu", FP64, route="two_pass"),
    "bn eval+add+silu 256@56 b32": call(CHANNEL, (32, 256, 56, 56), "silu", residual="pre_act", tracked=True, given=True),
    "bn eval+relu 256@56 b32 nhwc": call(CHANNEL, (32, 256, 56, 56), "relu", tracked=True, given=True, layout=NHWC),
    "brn+relu 512@14 b32, on chip": call(CHANNEL, (32, 512, 14, 14), "relu", rule=RENORM, tracked=True),
    "brn+add+relu 256@56 b32 nhwc": call(CHANNEL, (32, 256, 56, 56), "relu", rule=RENORM, residual="pre_act", tracked=True, layout=NHWC),
    "mean-only bn+relu 512@14 b32, on chip": call(CHANNEL, (32, 512, 14, 14), "relu", rule=MEAN_ONLY, tracked=True),
    "bin+add+silu 512@14 b32, on chip": call(CHANNEL, (32, 512, 14, 14), "silu", rule=BATCH_INSTANCE, residual="pre_act", tracked=True),
    "bin+add+silu 512@7 b64, on chip": call(CHANNEL, (64, 512, 7, 7), "silu", rule=BATCH_INSTANCE, residual="pre_act", tracked=True),
    "bin+relu 512@4 b16 nhwc, on chip": call(CHANNEL, (16, 512, 4, 4), "relu", rule=BATCH_INSTANCE, tracked=True, layout=NHWC),
    "bin eval+relu 256@16 b32 fp32, on chip": call(CHANNEL, (32, 256, 16, 16), "relu", FP32, rule=BATCH_INSTANCE, tracked=True, given=True),
    "bin+relu 128@16 b8 fp64, on chip": call(CHANNEL, (8, 128, 16, 16), "relu", FP64, rule=BATCH_INSTANCE),
    # group, instance, layer norm of maps, filter response
    "gn32+silu 320@32 b8, on chip": call(SAMPLE_GROUP, (8, 320, 32, 32), "silu", groups=32),
    "gn32+silu 320@16 b8 nhwc, on chip": call(SAMPLE_GROUP, (8, 320, 16, 16), "silu", groups=32, layout=NHWC),
    "gn32+silu 512@128 b4": call(SAMPLE_GROUP, (4, 512, 128, 128), "silu", groups=32),
    "gn32+silu 512@128 b4 nhwc": call(SAMPLE_GROUP, (4, 512, 128, 128), "silu", groups=32, layout=NHWC),
    "gn32+silu 320@32 b8 fp32": call(SAMPLE_GROUP, (8, 320, 32, 32), "silu", FP32, groups=32),
    "in+leaky 64@64^3 b2": call(SAMPLE_GROUP, (2, 64, 64, 64, 64), "leaky_relu", groups=64),
    "in+relu 64@64 b8, on chip": call(SAMPLE_GROUP, (8, 64, 64, 64), "relu", groups=64),
    "in+relu 512@4 b64, tracked, on chip": call(SAMPLE_GROUP, (64, 512, 4, 4), "relu", groups=512, tracked=True),
    "frn+tlu 256@56 b32, learned eps": call(SAMPLE_GROUP, (32, 256, 56, 56), "tlu", rule=RMS, groups=256, rule_weight=True),
    "frn+tlu 256@56 b32": call(SAMPLE_GROUP, (32, 256, 56, 56), "tlu", FP32, rule=RMS, groups=256, route="two_pass"),
    # rows and channels of maps
    "ln+gelu 4096x4096": call(POSITION, (4096, 4096), "gelu"),
    "add+rms 4096x4096": call(POSITION, (4096, 4096), rule=RMS, residual=PRE_NORM),
    "add+ln 4096x8192": call(POSITION, (4096, 8192), residual=PRE_NORM),
    "ln 4096x8192 fp32": call(POSITION, (4096, 8192), dtype=FP32),
    "rms 2048x16384": call(POSITION, (2048, 16384), rule=RMS),
    "ln 1024x65536": call(POSITION, (1024, 65536)),
    "ln 50000x96": call(POSITION, (50000, 96)),
    "ln+silu 96@56 b64 over channels": call(POSITION, (64, 96, 56, 56), "silu"),
    "ln+gelu 768@14 b64 over channels": call(POSITION, (64, 768, 14, 14), "gelu"),
    "ln+add+gelu 1000@7 b64 over channels": call(POSITION, (64, 1000, 7, 7), "gelu", residual="pre_act"),
    "ln 192@28 b64 nhwc": call(POSITION, (64, 192, 28, 28), layout=NHWC),
}  # fmt: skip


def _launches(
    scope: str, shape: tuple[int, ...], act: str, dtype: torch.dtype, *, rule: str, groups: int, layout: str, residual: str | None,
    route: str | None, tracked: bool, given: bool, rule_weight: bool, momentum: float | None,
) -> list[Launch]:  # fmt: skip
    """What one forward and one backward would launch on an H200; the tensors are only there for their type and address."""
    N, C = shape[:2]
    # on the meta device nothing is allocated; its address, 0, is as aligned as what torch allocates
    device = torch.device("meta")
    p = Problem(
        scope, rule, N, C, math.prod(shape[2:]), groups, layout, dtype, device, 1e-5, momentum, not given, parse(act), residual
    )  # fmt: skip
    make = lambda size, kind: torch.empty(size, dtype=kind, device=device)  # noqa: E731
    x, per_channel = make(shape, dtype), make((C,), p.accumulate)
    r = x if residual else None
    running = (per_channel, per_channel, make((), torch.int64)) if tracked else (None, None, None)
    own = per_channel if rule_weight or rule == BATCH_INSTANCE else None
    aw = per_channel if p.act.takes_weight else None
    bounds = ((make((), p.accumulate),) * 2,) if rule == RENORM else ()
    with forced(route, H200), recorded() as launches:
        y, mean, rstd, h = backend.norm_act(p, x, r, per_channel, per_channel, aw, own, *running, *bounds)
        source = h if backend.mask_bytes(p) else {None: None, "y": y, "residual": r}[p.z_source]
        dh = x if residual == PRE_NORM else None
        backend.norm_act_backward(p, x, dh, x, source, per_channel, per_channel, aw, own, mean, rstd, (True, True, True))
    return launches


@lru_cache(maxsize=2)
def _compiled(capability: int) -> list[tuple[str, Launch, Compiled]]:
    return [
        (name, launch, compile_launch(launch, capability)) for name, options in CALLS.items() for launch in _launches(**options)
    ]  # fmt: skip


def _stem(launch: Launch) -> str:
    return launch.kernel.__name__.removesuffix("_kernel")


@pytest.mark.parametrize("capability", [80, 90])
def test_nothing_spills(capability: int) -> None:
    spills = [
        f"{name}, {_stem(launch)}: {c.local_accesses} accesses, {c.stack_bytes} bytes"
        for name, launch, c in _compiled(capability)
        if c.local_accesses or c.stack_bytes
    ]
    assert not spills, spills


def _contiguous(options: dict[str, Any]) -> int:
    shape = options["shape"]
    return shape[1] if options["layout"] == NHWC or len(shape) == 2 else math.prod(shape[2:])


@pytest.mark.parametrize("capability", [80, 90])
def test_streams_are_wide(capability: int) -> None:
    """Where 16 divides the contiguous length, tensors of x's size move 16 bytes an access."""
    narrow = []
    for name, launch, c in _compiled(capability):
        options, stem = CALLS[name], _stem(launch)
        if stem not in STREAMING or _contiguous(options) % 16:
            continue
        if "single_pass" in stem and options["layout"] == NHWC and options["scope"] == SAMPLE_GROUP:
            continue  # a group's few channels are all that is contiguous
        if not c.wide_loads or not (c.wide_stores or stem in ("moments", "grad_moments")):
            narrow.append(f"{name}, {stem}: loads {c.wide_loads} of {c.loads}, stores {c.wide_stores} of {c.stores}")
    assert not narrow, narrow


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, FP64])
def test_every_activation_compiles(act: str, dtype: torch.dtype) -> None:
    for residual in (None, "pre_act") if parse(act).derivative_from_y(dtype) else (None,):
        options = call(CHANNEL, (4, 64, 32, 32), act, dtype, residual=residual, route="two_pass")
        for launch in _launches(**options):
            if _stem(launch) in ("apply", "grad_apply"):
                assert not compile_launch(launch, 90).local_accesses


def test_activations_take_no_slow_path() -> None:
    """In float32, exponentials and divisions are the hardware's: no calls, no division in software."""
    for act in ACTIVATIONS:
        options = call(CHANNEL, (4, 64, 32, 32), act, FP32, route="two_pass")
        (launch,) = (c for c in _launches(**options) if _stem(c) == "apply")
        ptx = compile_launch(launch, 90).ptx
        assert "div.rn" not in ptx, act
        assert ".func" not in ptx, act


def test_resources_are_written() -> None:
    if os.environ.get("NORMFUSED_WRITE_RESOURCES") != "1":
        pytest.skip("NORMFUSED_WRITE_RESOURCES=1 writes bench/results/triton-resources.md")
    import triton

    lines = [
        "# Triton kernels: registers, shared memory, width of accesses",
        "",
        "Written by `NORMFUSED_WRITE_RESOURCES=1 python -m pytest tests/triton/test_compile.py`: cross-compiled with triton",
        f"{triton.__version__}, no GPU. Each row is one launch of the host code, planned for an H200. Loads and stores: 16-byte",
        "ones of all in the SASS, those of coefficients and partial sums included.",
        "No kernel spills (a test says so). bf16 unless the call says otherwise.",
    ]
    for capability in (80, 90):
        lines += [
            "",
            f"## sm_{capability}",
            "",
            "| call | kernel | programs | warps | tile | registers | shared bytes | 16-byte loads | 16-byte stores | instructions |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, launch, c in _compiled(capability):
            tile = "x".join(str(launch.options[n]) for n in ("BSET", "BR", "BP", "BC", "BS") if n in launch.options)
            repeats = "".join(f" *{launch.options[n]}" for n in ("TILES", "BLOCKS_C", "BLOCKS") if launch.options.get(n, 1) > 1)
            lines.append(
                f"| {name} | {_stem(launch)} | {launch.programs} | {launch.options['num_warps']} | {tile}{repeats} | {c.registers} | "
                f"{c.shared_bytes} | {c.wide_loads}/{c.loads} | {c.wide_stores}/{c.stores} | {c.instructions} |"
            )
    RESOURCES.parent.mkdir(parents=True, exist_ok=True)
    RESOURCES.write_text("\n".join(lines) + "\n")
