"""`tests.support.cases` on the CUDA backend: on a GPU, or emulated, then with the plan's limits and the machine's order under control."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normfused.backends import cuda as backend
from normfused.backends.cuda import _load
from normfused.problem import PRE_NORM

from ..support import cases

ROUTES = {None: -1, "single_pass": 0, "two_pass": 1, "cluster": 2, "group": 3}  # the last two: single passes of shared sets
LIMITS = (
    *("processors", "shared_bytes_per_block", "shared_bytes_per_processor", "threads_per_processor"),
    *("largest_cluster", "spare_processors"),
)
# of a device so small that tensors of a few thousand elements take every branch of a plan
SMALL = (2, 65536, 65536, 512, 8, 0)
TINY = (2, 40000, 65536, 512, 8, 0)
FEW = (16, 40000, 65536, 512, 8, 0)  # sets are few beside its processors
ROOMY = (2, 80000, 162048, 512, 1, 0)  # its blocks hold a set together, and the beginning of the next
CRAMPED = (1, 114000, 232000, 512, 1, 0)  # even all of its blocks together hold little


def library() -> ctypes.CDLL:
    loaded = _load.library()
    assert loaded is not None, _load.reason()
    return ctypes.CDLL(str(loaded.path))


@contextmanager
def forced(route: str | None, limits: tuple[int, ...] | None) -> Iterator[None]:
    """Plans take ``route`` where they can, and the limits of a pretended device."""
    found = _load.library()
    assert found is not None
    c = library()
    c.normfused_force_route(ROUTES[route])
    if found.emulated and limits is not None:
        found.ops.set_limits(*limits)
    try:
        yield
    finally:
        c.normfused_force_route(-1)
        if found.emulated and limits is not None:
            found.ops.set_limits(132, 232448, 233472, 2048, 8, 0)


class Machine:
    """The emulation's controls (csrc/emulation/simt.h)."""

    ORDERS = ("forward", "reverse", "starve")

    def __init__(self) -> None:
        self.c = library()
        for name in ("nf_emulation_message", "nf_emulation_tensors", "nf_emulation_sites"):
            getattr(self.c, name).restype = ctypes.c_char_p
        self.c.nf_emulation_skip.argtypes = [ctypes.c_char_p, ctypes.c_int]

    @contextmanager
    def mode(self, order: str = "forward", seed: int = 1, races: bool = False, traffic: bool = False) -> Iterator[Machine]:
        self.c.nf_emulation_reset()
        self.c.nf_emulation_order(self.ORDERS.index(order), seed)
        self.c.nf_emulation_races(races)
        self.c.nf_emulation_traffic(traffic)
        try:
            yield self
        finally:
            self.c.nf_emulation_order(0, 1)
            self.c.nf_emulation_races(0)
            self.c.nf_emulation_traffic(0)
            self.c.nf_emulation_skip(b"", 0)
            self.c.nf_emulation_reset()

    def message(self) -> str:
        return self.c.nf_emulation_message().decode()

    def counters(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.c.nf_emulation_tensors())
        return found

    def sites(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.c.nf_emulation_sites())
        return found

    def skip(self, file: str, line: int) -> None:
        self.c.nf_emulation_skip(file.encode(), line)

    def reset(self) -> None:
        self.c.nf_emulation_reset()


@dataclass
class Case(cases.Case):
    limits: Any = SMALL

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        with forced(self.route, self.limits):
            y, mean, rstd, extra = backend.norm_act(self.p, self.x, self.r, self.w, self.b, self.aw, self.rw, *self.running, *self.bounds)
        self.mask = extra if extra is not None and extra.dtype == torch.uint8 else None
        if self.mask is not None:
            assert self.mask.numel() == backend.mask_bytes(self.p)
        return y, mean, rstd, extra if self.residual == PRE_NORM else None

    def backward(
        self, y: Tensor, mean: Tensor, rstd: Tensor, h: Tensor | None, needs: tuple[bool, bool, bool] = (True, True, True)
    ) -> tuple[Tensor | None, ...]:
        source = None
        if self.residual == "pre_act" and self.p.act.name != "identity":
            source = self.r if self.mask is None else self.mask
        x = self.x if h is None else h
        with forced(self.route, self.limits):
            return backend.norm_act_backward(self.p, self.dy, self.dh, x, source, self.w, self.b, self.aw, self.rw, mean, rstd, needs)
