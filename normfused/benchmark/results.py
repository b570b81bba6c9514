"""The results file: one header, one row per measurement. Everything that is read of a run is read from here.

A row that could not be measured is kept, with its ``status`` and the reason, so that nothing is silently missing. Figures that do not
exist on a device (``device_us`` on a CPU) are None, never 0. Times are medians over rounds in which the providers took turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUS = ("ok", "wrong", "failed", "refused", "absent")
PASSES = ("forward", "backward", "forward_backward")
MODES = ("training", "eval")


@dataclass
class OperatorRow:
    """One (case, pass, mode, provider). Times in microseconds a call, rates in 1e9 bytes a second, sizes in bytes."""

    case: str  # Case.name: unique together with what follows
    family: str
    norm: str
    act: str
    residual: str | None
    shape: tuple[int, ...]
    layout: str  # contiguous, channels_last
    dtype: str  # bfloat16, ...
    mode: str  # training, eval
    direction: str  # the pass: forward, backward, forward_backward
    provider: str
    status: str = "ok"
    reason: str | None = None  # of any other status
    device_us: float | None = None  # cache-cold: rotating over more memory than the L2 cache holds
    device_warm_us: float | None = None  # the same tensors again and again
    host_us: float | None = None  # wall clock; on a GPU what the host spends to issue the call, on a CPU the call itself
    bytes_min: int = 0  # that must move: see traffic.floor_bytes
    gbps: float | None = None  # bytes_min over the cold device time (CPU: over host_us)
    pct_copy: float | None = None  # gbps in per cent of the header's copy_gbps
    launches: int | None = None  # kernels a call, memsets and copies included
    peak_bytes: int | None = None  # allocator's peak over what was there before the call
    saved_bytes: int | None = None  # kept by autograd from forward to backward, parameters aside
    max_err: float | None = None  # largest |got - float64| over the largest |float64|, of y and every gradient
    err_of_allowed: float | None = None  # the same in units of what the type's roundings allow; above 1 is wrong
    route: str | None = None  # of normfused's cuda backend: single_pass, two_pass, ...
    note: str | None = None  # what a reader must know of the figure, e.g. why no CUDA graph
    spread: float | None = None  # interquartile range of the rounds over their median


@dataclass
class NetworkRow:
    """One training step (or inference) of a whole network, by one variant of its norms."""

    network: str  # resnet50, ...
    batch: int
    shape: tuple[int, ...]  # of one input, with the batch
    layout: str
    dtype: str  # what autocast computes in, or the parameters' type without it
    mode: str  # training, eval
    norms: str  # torch.nn, normfused
    execution: str  # eager, compile
    status: str = "ok"
    reason: str | None = None
    step_ms: float | None = None  # wall clock of a whole step, the device waited for
    device_ms: float | None = None  # between events on the device
    images_per_s: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    compile_s: float | None = None  # first steps, outside the measurement
    loss: float | None = None  # after the same steps from the same weights: that both train alike
    backend: str | None = None  # of normfused, as explain() names it
    replaced: int | None = None  # layers that are normfused's
    note: str | None = None
    spread: float | None = None


@dataclass
class Results:
    header: dict[str, Any]  # machine, versions, commit, copy_gbps, options; see operators.header
    rows: list[OperatorRow] = field(default_factory=list)
    networks: list[NetworkRow] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)  # provider or network -> why it is not here
    not_run: list[str] = field(default_factory=list)  # cases that time did not suffice for
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        """Whole or not at all: written beside the file and moved into place."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part")
        draft.write_text(_text(_rounded(asdict(self))))
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Raises ValueError that names the file and what is wrong with it."""
        try:
            given = json.loads(path.read_text())
            check(given)
        except ValueError as error:  # JSONDecodeError is one
            raise ValueError(f"{path}: {error}") from None
        return cls(
            given["header"],
            [_row(OperatorRow, r) for r in given["rows"]],
            [_row(NetworkRow, r) for r in given["networks"]],
            given["absent"],
            given["not_run"],
        )


def _text(given: dict[str, Any]) -> str:
    """A row to a line: a full matrix has thousands, and versions of a file are compared by lines."""
    parts = []
    for key, value in given.items():
        lines = [json.dumps(row) for row in value] if key in ("rows", "networks") else []
        parts.append(f'"{key}": ' + ("[\n" + ",\n".join(lines) + "\n]" if lines else json.dumps(value, indent=1)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _row(kind: type, given: dict[str, Any]) -> Any:
    return kind(**{**given, "shape": tuple(given["shape"])})


def _rounded(value: Any) -> Any:
    """Five digits: more would only make the files differ."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


def check(given: Any) -> None:
    """That ``given`` is a results file of this schema; raises ValueError with the first thing that is not."""
    if not isinstance(given, dict) or given.get("schema") != SCHEMA:
        found = given.get("schema") if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"results: schema must be {SCHEMA}, got {found}")
    for key, kind in (("header", dict), ("rows", list), ("networks", list), ("absent", dict), ("not_run", list)):
        if not isinstance(given.get(key), kind):
            raise ValueError(f"results: {key} must be a {kind.__name__}, got {type(given.get(key)).__name__}")
    row_types: tuple[tuple[str, Any], ...] = (("rows", OperatorRow), ("networks", NetworkRow))
    for name, row_type in row_types:
        known = {f.name: str(f.type) for f in fields(row_type)}
        for i, row in enumerate(given[name]):
            for key in known.keys() - row.keys():
                raise ValueError(f"results: {name}[{i}] must have {key}")
            for key, value in row.items():
                if key not in known:
                    raise ValueError(f"results: {name}[{i}] has {key}, which no schema knows")
                if not _fits(value, known[key]):
                    raise ValueError(f"results: {name}[{i}].{key} must be {known[key]}, got {value!r}")
            if row["status"] not in STATUS:
                raise ValueError(f"results: {name}[{i}].status must be one of {', '.join(STATUS)}, got {row['status']}")
            if row["status"] != "ok" and not row["reason"]:
                raise ValueError(f"results: {name}[{i}] is {row['status']} and must say why in reason")


def _fits(value: Any, kind: str) -> bool:
    if value is None:
        return "None" in kind
    if kind.startswith("tuple"):
        return isinstance(value, list | tuple) and all(isinstance(v, int) for v in value)
    if kind.startswith("float"):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind.startswith("int"):
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str)


def is_results(path: Path) -> bool:
    """Whether the file claims to be one of this module, of any schema; whether it is right is for `Results.load` to say."""
    try:
        given = json.loads(path.read_text())
    except ValueError:
        return False
    return isinstance(given, dict) and {"schema", "header", "rows", "networks"} <= given.keys()


def folder_name(machine: str) -> str:
    """The folder of bench/results for a device's name: "NVIDIA H200" -> "h200"; "(R)" and the like are left out."""
    return re.sub(r"[^A-Za-z0-9]+", "-", re.sub(r"\([A-Za-z]+\)", "", machine.removeprefix("NVIDIA "))).strip("-").lower() or "unknown"


def by(rows: Iterable[Any], *keys: str) -> dict[tuple[Any, ...], list[Any]]:
    """Rows grouped by the values of these fields, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, key) for key in keys), []).append(row)
    return groups
