"""Bytes: those that must move, those that each of normfused's routes asks for, those of torch.nn's chain, and those the emulation counted.

T = bytes of x. Parameters, moments and partial sums are left out: they are per channel or per set.
``python -m normfused.benchmark.traffic`` runs every case of the matrix, scaled down, under the emulation of the CUDA kernels and writes
what it counted to ``bench/results/traffic.json``.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..activations import Activation, parse
from ..backends.cuda import _load, mask_bytes
from ..problem import (
    BATCH_INSTANCE,
    CHANNEL,
    MEAN_ONLY,
    NCHW,
    NHWC,
    POSITION,
    PRE_ACT,
    PRE_NORM,
    RENORM,
    RMS,
    SAMPLE_GROUP,
    STANDARD,
    Problem,
)
from . import cases, providers
from .cases import CHANNELS_LAST, Case

__all__ = ["H200", "TABLE", "Planned", "count", "eager_bytes", "floor_bytes", "problem", "route_bytes", "routes", "slab_bytes", "table"]

H200 = {"processors": 132, "shared_bytes_per_block": 232448, "shared_bytes_per_processor": 233472, "threads_per_processor": 2048}
TABLE = Path(__file__).parents[2] / "bench" / "results" / "traffic.json"
_SCHEMA = 1
# How often a route reads x (backward: dy and x)
_READS = {"single_pass": 1, "apply": 1, "two_pass": 2, "slices": 2}
# Switchable norm mixes sets of all kinds: one read needs all of x on chip (bytes, an H200)
_COUPLED_NORMS, _ON_CHIP = ("switchable",), 45_000_000


# ----------------------------------------------------------------------------------------------------------------- by formula
def floor_bytes(case: Case, direction: str, mode: str = "training") -> int:
    """Bytes that must move: every input read once, every output written once.

    Args:
        direction: ``forward``, ``backward`` or ``forward_backward``.
        mode: ``training`` or ``eval``. An evaluation's forward alone leaves no mask; its backward is asked for gradients of parameters,
            so it reads x as training does.

    A residual before an activation with two slopes costs a bit an element, of others the residual again; ``pre_norm`` has the sum as a
    second output and its gradient as a second input.
    """
    if direction == "forward_backward":
        mask = _bit_mask(case) if mode == "eval" else 0  # a forward that is followed by a backward leaves one in either mode
        return floor_bytes(case, "forward", mode) + mask + floor_bytes(case, "backward", mode)
    size, again = case.tensor_bytes, int(case.norm in _COUPLED_NORMS and case.tensor_bytes > _ON_CHIP)
    if direction == "forward":
        tensors = 4 if case.residual == PRE_NORM else 3 if case.residual else 2
        return (tensors + again) * size + (_bit_mask(case) if mode == "training" else 0)
    if direction == "backward":
        tensors = 4 if case.residual == PRE_NORM else 3
        if _z_needs_the_residual(case):
            tensors += 1 if _bit_mask(case) else 2  # dresidual, and what z is known from
        return (tensors + 2 * again) * size + _bit_mask(case)
    raise ValueError(f"floor_bytes: direction must be forward, backward or forward_backward, got {direction}")


def route_bytes(case: Case, direction: str, mode: str, route: str, reads: float | None = None) -> int:
    """Bytes that a route asks for.

    Args:
        route: ``single_pass``, ``two_pass``, ``slices`` or ``apply``; of ``forward_backward`` also two of them, ``single_pass, two_pass``.
        reads: how often x is asked for, where the plan knows better than the route's name (`Planned.reads`).

    Raises:
        ValueError: a route or direction that does not exist.
    """
    if direction == "forward_backward":
        forward, _, backward = route.partition(", ")
        return route_bytes(case, "forward", mode, forward, reads) + route_bytes(case, "backward", mode, backward or forward, reads)
    if route not in _READS or direction not in ("forward", "backward"):
        raise ValueError(f"route_bytes: route must be one of {', '.join(_READS)} and direction a pass, got {route}, {direction}")
    times = _READS[route] if reads is None else reads
    size = case.tensor_bytes
    # a rule written in PyTorch keeps no mask, nor does batch-instance norm: z is known from the residual, which its steps read again
    mask = mask_bytes(problem(case, mode)) if _bit_mask(case) and route != "slices" else 0
    if direction == "forward":
        inputs = times + (1 if case.residual == PRE_NORM else 0)  # what is read again is h then
        return round((inputs + 1 + (1 if case.residual else 0)) * size) + mask
    inputs = 2 * times + (1 if case.residual == PRE_NORM else 0)
    if not _z_needs_the_residual(case):
        return round((inputs + 1) * size)
    return round((inputs + 2) * size + times * (mask or size))


def eager_bytes(case: Case, direction: str, mode: str = "training") -> int | None:
    """Bytes of torch.nn's chain (norm, add, activation) by its kernels' passes, None for norms that torch.nn does not have.

    ATen's own CUDA kernels, with nothing left in L2: batch, group and instance norm read x, then read it and write y; backward read dy
    and x, then both again and write dx. Group and instance norm copy channels_last to contiguous, and what follows copies back: four passes
    more, forward and backward. Layer and RMS norm along rows take 2 and 5; over the channels of contiguous maps a copy (2) before each.
    Activation 2 and 3, add 3 and none. float16 and float32 batch norm may go to cuDNN instead, which can need fewer. An eval forward
    of batch norm takes 2; its backward is taken to be training's.
    """
    if direction == "forward_backward":
        parts = [eager_bytes(case, one, mode) for one in ("forward", "backward")]
        return None if parts[0] is None or parts[1] is None else parts[0] + parts[1]
    if case.norm in ("batch", "group", "instance"):
        forward, backward = (2 if mode == "eval" and case.norm == "batch" else 3), 5
        if case.norm != "batch" and case.layout == CHANNELS_LAST:
            forward, backward = forward + 4, backward + 4
    elif case.norm in ("layer", "rms"):
        forward, backward = 2, 5
        if case.dim == 1 and case.layout != CHANNELS_LAST:
            forward, backward = forward + 2, backward + 2
    else:
        return None
    if case.act != "identity":
        forward, backward = forward + 2, backward + 3
    if case.residual:
        forward += 3
        backward += 3 if case.residual == PRE_NORM else 0  # the gradients of both outputs are added
    return case.tensor_bytes * (forward if direction == "forward" else backward)


def _act(case: Case) -> Activation:
    found = parse(case.act)
    assert isinstance(found, Activation), case
    return found


def _z_needs_the_residual(case: Case) -> bool:
    return case.residual == PRE_ACT and case.act != "identity"


def _bit_mask(case: Case) -> int:
    """Bytes of a bit an element, 0 where no mask is wanted."""
    return -(-case.numel // 8) if _z_needs_the_residual(case) and _act(case).has_two_slopes else 0


# -------------------------------------------------------------------------------------------------------------------- by plan
def problem(case: Case, mode: str = "training") -> Problem:
    """The call that normfused makes of a case; norms of a rule in PyTorch are seen as instance norm's sets, a set per (n, c)."""
    along_rows = case.norm in ("layer", "rms") and case.dim == -1
    n, c = (prod(case.shape[:-1]), case.shape[-1]) if along_rows else case.shape[:2]
    channel = dict.fromkeys(("batch", "batch_instance", "batch_renorm", "mean_only"), CHANNEL)
    scope = {**channel, "layer": POSITION, "rms": POSITION}.get(case.norm, SAMPLE_GROUP)
    rules = {"rms": RMS, "frn": RMS, "batch_instance": BATCH_INSTANCE}
    if mode == "training":  # what they evaluate is batch norm
        rules |= {"batch_renorm": RENORM, "mean_only": MEAN_ONLY}
    groups = (case.groups if case.norm == "group" else c) if scope == SAMPLE_GROUP else 1
    return Problem(
        scope,
        rules.get(case.norm, STANDARD),
        n,
        c,
        case.numel // (n * c),
        groups,
        NHWC if case.layout == CHANNELS_LAST else NCHW,
        case.dtype,
        torch.device("cpu"),
        batch_statistics=scope != CHANNEL or mode == "training",
        act=_act(case),
        residual_mode=case.residual,
    )


def slab_bytes(case: Case) -> int:
    """Bytes of the smallest part that has whole sets: one set, or a slice of 64 bytes of channels where sets lie side by side."""
    p, width = problem(case), case.dtype.itemsize
    if p.scope == POSITION:
        return p.C * width
    channels_last = p.layout == NHWC or p.S == 1
    positions = p.S * (p.N if p.scope == CHANNEL else 1)
    if p.scope == CHANNEL:
        return positions * (64 if channels_last else width)
    channels = p.C // p.groups
    return positions * width * (max(math.lcm(channels, 16 // width), 64 // width) if channels_last else channels)


@dataclass(frozen=True)
class Planned:
    """How the CUDA backend runs a pass: ``route``, and how often x is asked for (``reads``)."""

    route: str
    reads: float


def routes(case: Case, mode: str = "training", limits: dict[str, int] | None = None) -> dict[str, Planned] | None:
    """What the CUDA backend plans, forward and backward, on a device of these limits (default: an H200's).

    The plan is a function of compiled code; where neither the extension nor the emulation is there, the committed table answers for an
    H200, and None is returned for what it does not have.
    """
    if case.norm == "whitening":  # its passes are mostly matrix products of ATen
        return None
    if case.norm not in ("batch", "batch_instance", "batch_renorm", "mean_only", "group", "instance", "frn", "layer", "rms"):
        return {"forward": Planned("slices", 2), "backward": Planned("slices", 2)}
    library = _load.library()
    if library is not None and library.module is not None:
        found = {}
        for direction, step in (("forward", "norm_act"), ("backward", "norm_act_backward")):
            plan = library.describe(problem(case, mode), step, limits=limits or H200)
            assert plan is not None, "the module is there"
            found[direction] = Planned(plan["route"], plan["reads_of_x"])
        return found
    counted = table()["cases"].get(case.name, {}) if limits in (None, H200) else {}
    entries = {direction: counted.get(f"{mode} {direction}") for direction in ("forward", "backward")}
    if any(entry is None for entry in entries.values()):
        return None
    return {direction: Planned(entry["route"], entry["reads"]) for direction, entry in entries.items() if entry is not None}


def table(path: Path = TABLE) -> dict[str, Any]:
    """What `count` wrote; without a file a table of no cases. Raises ValueError for another schema."""
    if not path.exists():
        return {"schema": _SCHEMA, "limits": H200, "cases": {}}
    given: dict[str, Any] = json.loads(path.read_text())
    if given.get("schema") != _SCHEMA:
        raise ValueError(f"{path}: traffic: schema must be {_SCHEMA}, got {given.get('schema')}")
    return given


# ----------------------------------------------------------------------------------------------------------------- by counting
_ROUTES = {None: -1, "single_pass": 0, "two_pass": 1, "slices": 1}  # csrc/kernels/plan.h; apply follows from the call
_TENSORS = ("x", "residual", "y", "h", "dy", "dh", "dx", "dresidual", "mask")


def scaled(case: Case) -> Case:
    """A case of at most some hundred thousand elements that is walked like the given one.

    Kept: channels of a group, channels of position sets (they decide what stays on chip), and positions modulo 16, so that runs begin
    and end as far from a sector's boundary as they did.
    """
    if case.norm in ("layer", "rms") and case.dim == -1:
        return replace(case, shape=(min(4, prod(case.shape[:-1])), case.shape[-1]))
    n, c, *space = case.shape
    groups = case.groups
    if case.norm == "group":
        groups = min(4, groups)
        c = c // case.groups * groups
    elif case.norm == "batch":
        c = min(c, 64)
    elif case.norm not in ("layer", "rms"):
        c = min(c, 32)
    if not space:
        return replace(case, shape=(min(n, 64), c))
    positions = prod(space)
    if positions > 1024:
        positions = 512 + positions % 16
    return replace(case, shape=(min(n, 2), c, *[1] * (len(space) - 1), positions), groups=groups)


@contextmanager
def _forced(library: ctypes.CDLL, route: str) -> Iterator[None]:
    library.normfused_force_route(_ROUTES.get(route, -1))
    try:
        yield
    finally:
        library.normfused_force_route(-1)


def _counted(library: ctypes.CDLL, size: int) -> dict[str, Any]:
    """Bytes and sectors asked for since the last reset, of tensors of x's size, in units of ``size``; sets the counters back."""
    tensors = json.loads(library.nf_emulation_tensors())["tensors"]
    library.nf_emulation_reset()
    found = {name: tensors[name] for name in _TENSORS if name in tensors}
    return {
        "asked": round(sum(t["read_bytes"] + t["write_bytes"] for t in found.values()) / size, 5),
        "sectors": round(sum(t["read_sectors"] + t["write_sectors"] for t in found.values()) * 32 / size, 5),
        "tensors": {name: round((t["read_bytes"] + t["write_bytes"]) / size, 5) for name, t in found.items()},
    }


def count(case: Case, mode: str = "training", planned: dict[str, Planned] | None = None) -> dict[str, dict[str, Any]]:
    """Runs the case, scaled down, under the emulation by the routes that ``planned`` names (default: those of an H200).

    Returns:
        For ``forward`` and ``backward``: route, reads, the shape that was run, ``model`` (`route_bytes`), ``asked`` (bytes) and ``sectors``
        (32 bytes each), all as multiples of T, and of which tensors.

    Raises:
        RuntimeError: there is no emulation, or the scaled case does not take the route.
    """
    loaded = _load.library()
    if loaded is None or not loaded.emulated:
        raise RuntimeError(f"count: NORMFUSED_EMULATE=1 and a built emulation are needed, got: {_load.reason() or 'the CUDA extension'}")
    library = ctypes.CDLL(str(loaded.path))
    library.nf_emulation_tensors.restype = ctypes.c_char_p
    planned = planned or routes(case, mode)
    assert planned is not None
    small = scaled(case)
    module = providers.prepare(providers.Provider("cuda", providers.ours("cuda")), small, "cpu", mode == "training")
    x, residual, dy = providers.tensors(small, "cpu")
    leaves = [t.requires_grad_() for t in (x, residual) if t is not None]
    found, own = {}, {}
    library.nf_emulation_reset()
    library.nf_emulation_traffic(1)

    def reads_of_scaled(direction: str) -> float:
        """A set too large for the device may fit when it is scaled down."""
        plans = routes(small, mode)
        assert plans is not None
        return plans[direction].reads

    try:
        with _forced(library, planned["forward"].route):
            own["forward"] = reads_of_scaled("forward")
            out = module(*leaves)
            found["forward"] = _counted(library, small.tensor_bytes)
        out, given = (out, (dy, providers.tensors(small, "cpu", 1)[2])) if isinstance(out, tuple) else ((out,), (dy,))
        with _forced(library, planned["backward"].route):
            own["backward"] = reads_of_scaled("backward")
            torch.autograd.grad(out, [*leaves, *module.parameters()], given)
            found["backward"] = _counted(library, small.tensor_bytes)
    finally:
        library.nf_emulation_traffic(0)
        library.nf_emulation_reset()
    return {
        direction: {
            "route": planned[direction].route,
            "reads": round(planned[direction].reads, 5),
            "shape": list(small.shape),
            "model": round(route_bytes(small, direction, mode, planned[direction].route, own[direction]) / small.tensor_bytes, 5),
            **counters,
        }
        for direction, counters in found.items()
    }


def modes_of(case: Case) -> tuple[str, ...]:
    """Training, and evaluation where it is another computation."""
    return ("training", "eval") if case.norm == "batch" else ("training",)


def main() -> int:
    if os.environ.get("NORMFUSED_EMULATE") != "1" or _load.library() is None:
        why = _load.reason() or "NORMFUSED_EMULATE is not 1"
        print(f"traffic: the emulation of the CUDA kernels is needed ({why}); in a checkout: make emulation, then NORMFUSED_EMULATE=1")
        return 1
    lines, known = [], {}
    for case in dict.fromkeys([*cases.MATRIX, *cases.QUICK]):
        if case.norm == "whitening":
            continue
        entries: dict[str, dict[str, Any]] = {}
        for mode in modes_of(case):
            planned = routes(case, mode)
            assert planned is not None
            key = (scaled(case).name, mode, planned["forward"], planned["backward"])
            if key not in known:
                known[key] = count(case, mode, planned)
            entries |= {f"{mode} {direction}": entry for direction, entry in known[key].items()}
        lines.append(f"{json.dumps(case.name)}: {json.dumps(entries)}")
    head = f'{{"schema": {_SCHEMA}, "limits": {json.dumps(H200)}, "cases": {{\n'
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(head + ",\n".join(lines) + "\n}}\n")
    print(f"{len(lines)} cases, {len(known)} of them run scaled down: {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
