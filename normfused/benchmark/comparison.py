"""Rows that belong together: one case, mode and pass by every provider, and what normfused's figure is against the others'."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod

from .cases import HEADLINE, MATRIX
from .results import NetworkRow, OperatorRow, Results, by

OURS = ("normfused-cuda", "normfused-triton", "normfused-torch")  # as the dispatcher takes them
EAGER, COMPILE = "eager", "compile"  # the latter begins the names of all modes of torch.compile


def is_ours(provider: str) -> bool:
    return provider.startswith("normfused")


def faster(new: float | None, old: float | None) -> float | None:
    """How many times as fast as ``old`` ``new`` is, both in the same unit of time."""
    return None if not new or not old else old / new


@dataclass(frozen=True)
class Comparison:
    """``rows`` by provider. ``device`` says which clock counts: the device's, cache-cold, or on a CPU the wall clock."""

    case: str
    mode: str
    direction: str
    device: str
    rows: dict[str, OperatorRow]

    def time_us(self, row: OperatorRow | None) -> float | None:
        """Microseconds a call; None for what was not timed, and for wrong or failed rows."""
        if row is None or row.status != "ok":
            return None
        return row.host_us if self.device == "cpu" else row.device_us

    def _best(self, prefix: str) -> OperatorRow | None:
        known = [row for name, row in self.rows.items() if name.startswith(prefix)]
        timed = [row for row in known if self.time_us(row)]
        return min(timed, key=lambda row: self.time_us(row) or 0.0) if timed else next(iter(known), None)

    @cached_property
    def ours(self) -> OperatorRow | None:
        """What a user gets: the first backend in the dispatcher's order that is not absent; a failure of it is not hidden by another."""
        found = [self.rows[name] for name in OURS if name in self.rows and self.rows[name].status != "absent"]
        return found[0] if found else None

    @cached_property
    def eager(self) -> OperatorRow | None:
        return self.rows.get(EAGER)

    @cached_property
    def compiled(self) -> OperatorRow | None:
        """The fastest mode of torch.compile."""
        return self._best(COMPILE)

    @cached_property
    def fastest_peer(self) -> OperatorRow | None:
        """Of the other libraries that were timed."""
        peers = [r for name, r in self.rows.items() if not name.startswith((EAGER, COMPILE)) and not is_ours(name) and self.time_us(r)]
        return min(peers, key=lambda r: self.time_us(r) or 0.0, default=None)

    @property
    def any(self) -> OperatorRow:
        return self.ours or next(iter(self.rows.values()))

    def speedup(self, other: OperatorRow | None) -> float | None:
        """How many times as fast as ``other`` normfused is; None unless both were timed."""
        return faster(self.time_us(self.ours), self.time_us(other))


def comparisons(results: Results) -> list[Comparison]:
    """In the order of the file."""
    device = results.header.get("device", "cpu")
    return [
        Comparison(case, mode, direction, device, {row.provider: row for row in rows})
        for (case, mode, direction), rows in by(results.rows, "case", "mode", "direction").items()
    ]


def headline(found: list[Comparison]) -> list[Comparison]:
    """Training steps, forward and backward: the headline cases of the matrix; where there are none, the largest of every kind."""
    steps = [c for c in found if c.mode == "training" and c.direction == "forward_backward"]
    telling = {case.name for case in MATRIX if case.tier == HEADLINE}
    if any(c.case in telling for c in steps):
        return [c for c in steps if c.case in telling]
    largest: dict[tuple[object, ...], Comparison] = {}
    for c in steps:
        row = c.any
        key = (row.family or row.norm, row.norm, row.act, row.residual, row.layout, row.dtype, "dim1" in c.case)
        if key not in largest or prod(row.shape) > prod(largest[key].any.shape):
            largest[key] = c
    return list(largest.values())


@dataclass(frozen=True)
class NetworkComparison:
    """One network, batch, layout, type, mode and execution: with torch.nn's norms and with normfused's."""

    key: tuple[str, int, str, str, str, str]
    theirs: NetworkRow | None
    ours: NetworkRow | None

    @property
    def speedup(self) -> float | None:
        return None if self.ours is None or self.theirs is None else faster(self.ours.step_ms, self.theirs.step_ms)


def network_comparisons(rows: Iterable[NetworkRow]) -> list[NetworkComparison]:
    found = []
    for key, group in by(rows, "network", "batch", "layout", "dtype", "mode", "execution").items():
        sides = [next((r for r in group if is_ours(r.norms) == ours), None) for ours in (False, True)]
        found.append(NetworkComparison(key, *sides))  # type: ignore[arg-type]
    return found
