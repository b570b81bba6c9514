"""The goals P1 to P14: what each asks for, whom it beats, and which rows of a results file answer it.

A goal has parts. It is met when every part is and all of its cases were measured, missed when one part is missed, "met in part" when
what was measured is met and something was not. Only rows of a CUDA device count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .cases import CHANNELS_LAST, CONTIGUOUS, MATRIX, Case
from .comparison import Comparison, comparisons, network_comparisons
from .results import Results
from .traffic import slab_bytes

__all__ = ["NOT_MEASURED", "TARGETS", "Finding", "Target", "Verdict", "judge"]

NOT_MEASURED = "not measured on a GPU yet"
_MB = 1_000_000
_SMALL = 5 * _MB  # below, launches and not bytes decide


@dataclass(frozen=True)
class Finding:
    """What one part of a goal came to: ``met`` is None where no row answers, ``complete`` False where cases are missing."""

    text: str
    met: bool | None
    complete: bool = True


Part = Callable[[Results], Finding]


@dataclass(frozen=True)
class Target:
    name: str
    goal: str
    number: str
    anchor: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Verdict:
    """``verdict``: met, met in part, missed, or not measured."""

    measured: str
    verdict: str


def judge(target: Target, results: Results | None) -> Verdict:
    """What a results file says of a goal; None or a file of a CPU says nothing."""
    if results is None or results.header.get("device") != "cuda":
        return Verdict(NOT_MEASURED, "not measured")
    findings = [part(results) for part in target.parts]
    text = "; ".join(f.text for f in findings)
    known = [f.met for f in findings if f.met is not None]
    if not known:
        return Verdict(text, "not measured")
    if not all(known):
        return Verdict(text, "missed")
    return Verdict(text, "met" if len(known) == len(findings) and all(f.complete for f in findings) else "met in part")


# ----------------------------------------------------------------------------------------------------------- parts of operators
Select = Callable[[Case], bool]
Value = Callable[[Comparison], "float | None"]


def every(what: str, select: Select, direction: str, value: Value, bound: float, at_least: bool = True, unit: str = "") -> Part:
    """All selected cases of the matrix, in bfloat16 and training, reach ``bound``; a case where normfused is wrong or fails does not.

    ``direction`` "any" is for what does not depend on the pass: whichever rows have it.
    """

    def part(results: Results) -> Finding:
        wanted = {c.name for c in MATRIX if c.dtype == torch.bfloat16 and select(c)}
        rows = [c for c in comparisons(results) if c.case in wanted and direction in ("any", c.direction) and c.mode == "training"]
        broken = list(dict.fromkeys(c.case for c in rows if c.ours is not None and c.ours.status in ("wrong", "failed")))
        values = {c.case: v for c in rows if c.case not in broken and (v := value(c)) is not None}
        if not values and not broken:
            return Finding(f"{what}: not measured", None)
        reached = [name for name, v in values.items() if (v >= bound if at_least else v <= bound)]
        text = f"{what}: {len(reached)} of {len(values) + len(broken)} cases"
        if values:
            worst = (min if at_least else max)(values, key=lambda name: values[name])
            text += f", worst {values[worst]:.3g}{unit} ({worst})"
        if broken:
            text += f", wrong or failed: {', '.join(broken)}"
        missing = len(wanted) - len(values) - len(broken)
        if missing:
            text += f", {missing} not measured"
        return Finding(text, len(reached) == len(values) and not broken, complete=not missing)

    return part


def unanswered(what: str) -> Part:
    """A part that no row answers."""
    return lambda results: Finding(what, None)


def _of_copy(c: Comparison) -> float | None:
    return None if c.ours is None or c.ours.status != "ok" else c.ours.pct_copy


def _us(c: Comparison) -> float | None:
    return c.time_us(c.ours)


def _warm_us(c: Comparison) -> float | None:
    return None if c.ours is None or c.ours.status != "ok" else c.ours.device_warm_us


def _host_us(c: Comparison) -> float | None:
    return None if c.ours is None or c.ours.status != "ok" else c.ours.host_us


def _launches(c: Comparison) -> float | None:
    return None if c.ours is None or c.ours.status != "ok" else c.ours.launches


def _over_eager(c: Comparison) -> float | None:
    return c.speedup(c.eager)


def _over_compile(c: Comparison) -> float | None:
    return c.speedup(c.compiled)


def _host_of_eager(c: Comparison) -> float | None:
    ours, theirs = _host_us(c), None if c.eager is None or c.eager.status != "ok" else c.eager.host_us
    return None if ours is None or not theirs else ours / theirs


def _in_one_pass(c: Comparison) -> float | None:
    return None if c.ours is None or c.ours.status != "ok" or c.ours.route is None else float("two_pass" not in c.ours.route)


def _error_of_eager(c: Comparison) -> float | None:
    if c.ours is None or c.eager is None or c.ours.max_err is None or c.eager.max_err is None:
        return None
    return c.ours.max_err / c.eager.max_err if c.eager.max_err else (0.0 if not c.ours.max_err else float("inf"))


def _captured(c: Comparison) -> float | None:
    return None if c.ours is None or c.ours.status != "ok" else float("graph" not in (c.ours.note or ""))


def _saved_of_x(c: Comparison) -> float | None:
    """In units of T; a mask, a sixteenth, is taken off."""
    if c.ours is None or c.ours.saved_bytes is None:
        return None
    case = _CASES[c.case]
    return (c.ours.saved_bytes - (case.tensor_bytes / 16 if case.residual else 0)) / case.tensor_bytes


def _saved_with_y(c: Comparison) -> float | None:
    """Of eager's, with y, which the next layer keeps."""
    if c.ours is None or c.eager is None or c.ours.saved_bytes is None or c.eager.saved_bytes is None:
        return None
    y = _CASES[c.case].tensor_bytes
    return (c.ours.saved_bytes + y) / (c.eager.saved_bytes + y)


_CASES = {case.name: case for case in MATRIX}


def _rows(c: Case) -> bool:
    return c.norm in ("layer", "rms") and c.dim == -1


def _maps(c: Case) -> bool:
    return c.norm in ("batch", "group", "instance") and len(c.shape) > 2


def _single_read(largest_slab: int) -> Select:
    return lambda c: _maps(c) and c.layout == CONTIGUOUS and c.tensor_bytes >= 64 * _MB and slab_bytes(c) <= largest_slab


def _shape(*shape: int) -> Select:
    return lambda c: c.shape == shape and c.layout == CONTIGUOUS


def _bn_add_relu(c: Case) -> bool:
    return c.family == "ResNet-50" and c.norm == "batch" and c.residual == "pre_act" and c.act == "relu"


# ------------------------------------------------------------------------------------------------------------ parts of networks
def network(
    what: str, name: str | None, bound: float, execution: str = "eager", layout: str | None = None, batch: int | None = None
) -> Part:
    """A training step of the network (None: of every one) is ``bound`` times as fast as with torch.nn's norms.

    ``layout`` channels_last is also channels_last_3d.
    """

    def part(results: Results) -> Finding:
        def chosen() -> Iterator[tuple[str, float]]:
            for c in network_comparisons(results.networks):
                network, size, memory, _, mode, run = c.key
                right = name in (None, network) and mode == "training" and run == execution
                if right and memory.startswith(layout or "") and batch in (None, size) and c.speedup is not None:
                    yield f"{network}, batch {size}", c.speedup

        values = dict(chosen())
        if not values:
            return Finding(f"{what}: not measured", None)
        worst = min(values, key=lambda key: values[key])
        return Finding(f"{what}: {values[worst]:.3f}x ({worst})", values[worst] >= bound)

    return part


TARGETS: tuple[Target, ...] = (
    Target(
        "P1",
        "row norms forward, T >= 64 MB, with and without add",
        ">= 95 % of the copy rate",
        "torch.compile 4.18 TB/s at best, cuDNN 3.85",
        (every("of the copy rate", lambda c: _rows(c) and c.tensor_bytes >= 64 * _MB, "forward", _of_copy, 95, unit=" %"),),
    ),
    Target(
        "P2",
        "row norms backward with dgamma and dbeta, T > 5 MB",
        ">= 88 % of the copy rate",
        "cuDNN 3.80 TB/s at best, 0.95 at worst; compile 1.7; eager 1.5 to 1.8",
        (every("of the copy rate", lambda c: _rows(c) and c.tensor_bytes > _SMALL, "backward", _of_copy, 88, unit=" %"),),
    ),
    Target(
        "P3",
        "GN, IN, BN contiguous forward with activation, sets <= 30 MB, T >= 64 MB",
        "x read once, >= 85 % of the copy rate; 128x20x256x256 <= 185 us, 512x16x180x320 <= 520 us, BN 4x128x1024x1024 <= 590 us",
        "259.7, 987.5 and 911.7 us (H200)",
        (
            every("x read once", _single_read(30 * _MB), "forward", _in_one_pass, 1),
            every("of the copy rate", _single_read(30 * _MB), "forward", _of_copy, 85, unit=" %"),
            every("128x20x256x256", _shape(1, 128, 20, 256, 256), "forward", _us, 185, at_least=False, unit=" us"),
            every("512x16x180x320", _shape(1, 512, 16, 180, 320), "forward", _us, 520, at_least=False, unit=" us"),
            every("BN 4x128x1024x1024", _shape(4, 128, 1024, 1024), "forward", _us, 590, at_least=False, unit=" us"),
        ),
    ),
    Target(
        "P4",
        "the same backward, sets <= 20 MB",
        ">= 78 % of the copy rate of 3T, >= 2.5x eager, >= 1.8x compile",
        "eager 8T, compile 6 to 7T",
        (
            every("of the copy rate", _single_read(20 * _MB), "backward", _of_copy, 78, unit=" %"),
            every("over eager", _single_read(20 * _MB), "backward", _over_eager, 2.5, unit="x"),
            every("over compile", _single_read(20 * _MB), "backward", _over_compile, 1.8, unit="x"),
        ),
    ),
    Target(
        "P5",
        "BN, GN channels_last forward, slices of 64 bytes <= 30 MB, T > 5 MB",
        ">= 80 % of the copy rate",
        "cuDNN persistent and ReLU (4 passes)",
        (
            every(
                "of the copy rate",
                lambda c: (
                    c.norm in ("batch", "group") and c.layout == CHANNELS_LAST and c.tensor_bytes > _SMALL and slab_bytes(c) <= 30 * _MB
                ),
                "forward",
                _of_copy,
                80,
                unit=" %",
            ),
        ),
    ),
    Target(
        "P6",
        "channels_last, slices a little too large (30 to 55 MB)",
        "<= 2.35T forward, <= 4.0T backward from DRAM",
        "kernels of two reads",
        (unanswered("DRAM's bytes are not among these rows: ncu counts them, `make gpu STAGES=ncu`"),),
    ),
    Target(
        "P7",
        "BN + add + ReLU with a bit mask, ResNet-50, 32 and 256 samples",
        "single pass (3.06T, 4.06T); >= 2.2x eager, >= 1.5x compile",
        "apex groupbn, which has no bfloat16",
        (
            every("forward in one pass", _bn_add_relu, "forward", _in_one_pass, 1),
            every("backward in one pass", _bn_add_relu, "backward", _in_one_pass, 1),
            every("over eager", _bn_add_relu, "forward_backward", _over_eager, 2.2, unit="x"),
            every("over compile", _bn_add_relu, "forward_backward", _over_compile, 1.5, unit="x"),
        ),
    ),
    Target(
        "P8",
        "GN of 32 groups, 1 or 2 samples, forward",
        ">= 8x eager",
        "one block a group: 32 of an H200's 132 processors",
        (every("over eager", lambda c: c.norm == "group" and c.groups == 32 and c.shape[0] <= 2, "forward", _over_eager, 8, unit="x"),),
    ),
    Target(
        "P9",
        "small tensors (T <= 5 MB), warm",
        "1 launch each way; <= 4 us forward, <= 5 us backward on the device",
        "TileOPs 2.6 to 3.9 us, compile 3.5 to 10",
        (
            every("launches forward", lambda c: c.tensor_bytes <= _SMALL, "forward", _launches, 1, at_least=False),
            every("launches backward", lambda c: c.tensor_bytes <= _SMALL, "backward", _launches, 1, at_least=False),
            every("forward", lambda c: c.tensor_bytes <= _SMALL, "forward", _warm_us, 4, at_least=False, unit=" us"),
            every("backward", lambda c: c.tensor_bytes <= _SMALL, "backward", _warm_us, 5, at_least=False, unit=" us"),
        ),
    ),
    Target(
        "P10",
        "host time, eager, with grad",
        "<= 8 us forward, <= 10 us backward; never above torch.nn's chain",
        "torch.nn 15 to 40 us, Liger 100 to 300",
        (
            every("forward", lambda c: True, "forward", _host_us, 8, at_least=False, unit=" us"),
            every("backward", lambda c: True, "backward", _host_us, 10, at_least=False, unit=" us"),
            every("of the chain's", lambda c: True, "forward_backward", _host_of_eager, 1, at_least=False, unit="x"),
        ),
    ),
    Target(
        "P11",
        "CUDA graphs and torch.compile",
        "captured; networks never more than 3 % slower than compile alone",
        "custom kernels that break fusion: 3.8 to 13.6 % slower end to end",
        (
            every("captured forward and backward", lambda c: True, "forward_backward", _captured, 1),
            network("compiled networks against torch.nn's", None, 0.97, "compile"),
        ),
    ),
    Target(
        "P12",
        "memory saved for the backward",
        "x only (and a mask of T/16); SiLU, GELU: a third less than eager with y; LeakyReLU with memory_efficient: half (y only)",
        "inplace_abn: half, 0.8 to 2 % slower",
        (
            every(
                "in units of x",
                lambda c: c.residual is None or (c.residual == "pre_act" and c.act == "relu"),
                "any",
                _saved_of_x,
                1.05,
                at_least=False,
                unit="x",
            ),
            every(
                "SiLU, GELU of eager's",
                lambda c: c.act in ("silu", "gelu") and not c.residual,
                "any",
                _saved_with_y,
                0.7,
                at_least=False,
                unit="x",
            ),
            unanswered("in place: not built"),
        ),
    ),
    Target(
        "P13",
        "numerics",
        "error against float64 no larger than eager's; the same bits run to run",
        "kernels with E[x^2] - E[x]^2",
        (
            every("of eager's error", lambda c: True, "any", _error_of_eager, 1, at_least=False, unit="x"),
            unanswered("bits run to run: not among these rows; tests/gpu/test_bits.py compares them"),
        ),
    ),
    Target(
        "P14",
        "whole networks, training step",
        "ResNet-50, 256 NHWC samples: >= 1.12x eager, >= 1.03x compile; nnU-Net NHWC >= 1.25x; GN U-Net, one sample >= 1.2x",
        "the bytes of their norms",
        (
            network("ResNet-50 eager", "resnet50", 1.12, layout=CHANNELS_LAST, batch=256),
            network("ResNet-50 compile", "resnet50", 1.03, "compile", CHANNELS_LAST, 256),
            network("nnU-Net", "nnunet", 1.25, layout=CHANNELS_LAST),
            network("GN U-Net", "diffusion_unet", 1.2, batch=1),
        ),
    ),
)
