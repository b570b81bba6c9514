"""Runs the operator matrix: every case by every provider, checked against float64 before it is timed.

A provider that is wrong gets no figures, one that raises does not stop the others, and a backend of normfused that fails its self-test
is not timed at all. Results are saved after every case.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import nn

from .. import selftest
from ..explain import explain
from . import accuracy, timing, traffic
from . import header as headers
from .cases import Case
from .providers import Provider, prepare, saved_bytes
from .results import MODES, PASSES, OperatorRow, Results
from .timing import Figures, Inputs

# Before the first case is done: seconds of one by one provider, and what a compilation adds. A guess, corrected by every case
_SECONDS = {"cpu": 0.35, "cuda": 0.7}
_COMPILATION = {"cpu": 4.0, "cuda": 6.0}


@dataclass(frozen=True)
class Event:
    """What a run reports while it goes on. ``kind``: "start", "case" (one is begun), "provider" (being checked), "timing", "done"."""

    kind: str
    text: str
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    rows: Sequence[OperatorRow] = ()


@dataclass
class Run:
    """What stays the same from case to case."""

    device: str
    directions: Sequence[str]
    modes: Sequence[str]
    rounds: int
    copy_gbps: float = float("nan")
    faulty: dict[str, str] = field(default_factory=dict)  # provider -> what its self-test found
    say: Callable[[Event], None] = lambda event: None
    left_out: Callable[[Provider, Case], str | None] = lambda provider, case: None


class CannotResume(ValueError):
    """The results to go on with are not of this machine, code and selection; the message shows both sides."""


def run(
    cases: Sequence[Case],
    providers: Sequence[Provider],
    *,
    device: str,
    directions: Sequence[str] = PASSES,
    modes: Sequence[str] = MODES,
    rounds: int = timing.ROUNDS,
    seconds: float | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    path: Path | None = None,
    resume: Results | None = None,
    left_out: Callable[[Provider, Case], str | None] = lambda provider, case: None,
) -> Results:
    """Measures ``cases`` by ``providers``, who take turns.

    Args:
        directions, modes: of `results.PASSES` and `results.MODES`. In eval a module is timed forward and without grad only.
        rounds: figures are medians over so many.
        seconds: no case is begun after these; those left go to ``not_run``.
        path: saved there after every case.
        resume: results that are gone on with, of the same machine, software, commit and selection; cases in them are not run again.
        left_out: why a provider that could run a case is not asked to, or None.

    Returns:
        All results; Ctrl-C ends the run early, and ``header["interrupted"]`` says so.

    Raises:
        CannotResume: ``resume`` is of another machine, software, commit or selection.
    """
    started = time.monotonic()
    options = {"providers": [p.name for p in providers], "directions": list(directions), "modes": list(modes), "rounds": rounds}
    results = Results(headers.header(device, options))
    if resume is not None:
        results = gone_on_with(resume, results.header)
    results.absent |= {p.name: p.absent for p in providers if p.absent is not None}
    present = [p for p in providers if p.absent is None]
    known = {row.case for row in results.rows}
    waiting = [c for c in cases if c.name not in known]
    results.not_run = [c.name for c in waiting]
    this = Run(device, directions, modes, rounds, say=on_event, left_out=left_out)
    guesses = [_guess(case, present, this) for case in waiting]
    if waiting:
        on_event(Event("start", f"{len(waiting)} case{'s' * (len(waiting) > 1)}", 0, len(waiting), sum(guesses)))
    try:
        with _torch_set_up(device):
            this.copy_gbps = timing.copy_rate(device) / 1e9
            results.header.setdefault("copy_gbps", this.copy_gbps)
            this.faulty = self_tests(present, device)
            results.header["self_test"] = {p.name: this.faulty.get(p.name, "passed") for p in present if backend_of(p) is not None}
            first = time.monotonic()
            for done, case in enumerate(waiting):
                if seconds is not None and time.monotonic() - started > seconds:
                    break
                begun = time.monotonic()
                on_event(Event("case", case.name, done, len(waiting), seconds_left(guesses, done, begun - first)))
                rows = measure_case(case, present, this)
                results.rows += rows
                results.not_run.remove(case.name)
                _save(results, path)
                left = seconds_left(guesses, done + 1, time.monotonic() - first)
                on_event(Event("done", f"{case.name}: {time.monotonic() - begun:.1f} s", done + 1, len(waiting), left, rows))
                if not _device_answers(device):
                    results.header["interrupted"] = "the device answers no more; a new process can go on with --resume"
                    break
    except KeyboardInterrupt:
        results.header["interrupted"] = "Ctrl-C"
    if device == "cuda":
        results.header["clocks_after"] = headers.clocks()
    _save(results, path)
    return results


def gone_on_with(before: Results, now: dict[str, Any]) -> Results:
    """``before``, to be added to by the run that ``now`` is the header of; CannotResume unless both are of one machine and code."""
    different = headers.differences(before.header, now)
    there, here = before.header["options"], now["options"]
    different += [f"{key}: {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
    if different:
        raise CannotResume(f"resume: a run goes on only where it began and with the same options, got {'; '.join(different)}")
    before.header.pop("interrupted", None)
    before.header.setdefault("resumed", []).append(now["date"])
    return before


def _guess(case: Case, providers: Sequence[Provider], this: Run) -> float:
    """Seconds that a case takes, roughly."""
    asked = [p for p in providers if this.left_out(p, case) is None and p.refuses(case, this.device) is None]
    return len(this.modes) * sum(_SECONDS[this.device] + (_COMPILATION[this.device] if _compiles(p) else 0.0) for p in asked)


def seconds_left(guesses: Sequence[float], done: int, taken: float) -> float:
    """For all cases but the first ``done``, which took ``taken``: as guessed, times what the guess has been worth so far."""
    return sum(guesses[done:]) * (taken / sum(guesses[:done]) if sum(guesses[:done]) else 1.0)


def _save(results: Results, path: Path | None) -> None:
    if path is not None:
        results.save(path)


@contextmanager
def _torch_set_up(device: str) -> Iterator[None]:
    """A backward runs again and again over what one forward saved, so Inductor must not reuse that memory; and it must not give up
    compiling in silence after a few shapes."""
    with (
        torch._functorch.config.patch(donated_buffer=False),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
        timing.side_stream(device),
    ):
        yield


# --------------------------------------------------------------------------------------------------------------- who is timed
def backend_of(provider: Provider) -> str | None:
    """normfused's backend, of its own providers."""
    return provider.name.removeprefix("normfused-") if provider.name.startswith("normfused-") else None


def _compiles(provider: Provider) -> bool:
    return "compile" in provider.name


def self_tests(providers: Sequence[Provider], device: str) -> dict[str, str]:
    """What is wrong with those of normfused's backends that fail their self-test."""
    faulty = {}
    for provider in providers:
        backend = backend_of(provider)
        if backend is None:
            continue
        try:
            found = selftest.run(backend, device)
        except Exception as error:
            faulty[provider.name] = f"self-test failed: {first_line(error)}"
            continue
        if not found["passed"]:
            faulty[provider.name] = f"self-test failed: {found['worst_error_of_tolerance']:.3g} of the tolerance in {found['worst_case']}"
    return faulty


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------------------------ one case
def measure_case(case: Case, providers: Sequence[Provider], this: Run) -> list[OperatorRow]:
    """A row of every mode, direction and provider."""
    rows: list[OperatorRow] = []
    for mode in this.modes:
        # in eval nothing is kept for a backward: that is what it is timed for
        directions = [d for d in this.directions if mode == "training" or d == "forward"]
        try:
            rows += _measure_mode(case, mode, directions, providers, this) if directions else []
        except Exception as error:  # such as no memory for the oracle or for the inputs
            rows += [_failed(case, mode, d, p.name, first_line(error)) for d in directions for p in providers]
        if not _device_answers(this.device):
            break
        torch.compiler.reset()  # else it would keep what it compiled
        timing.free()
    return rows


def _measure_mode(case: Case, mode: str, directions: list[str], providers: Sequence[Provider], this: Run) -> list[OperatorRow]:
    training, rows = mode == "training", []
    verdicts, modules = _checked(case, training, providers, this)
    data = timing.inputs(case, this.device, training)
    for direction in directions:
        this.say(Event("timing", f"{case.name} {mode} {direction}"))
        found = timing.measure(modules, data, direction, this.device, this.rounds)
        for provider in providers:
            row = _row(case, mode, direction, provider.name)
            vars(row).update(verdicts[provider.name])
            got = found.get(provider.name)
            if isinstance(got, Figures):
                _fill(row, got, this)
                if training:
                    row.saved_bytes = _kept(modules[provider.name], data[0])
                row.route = _route(provider, modules[provider.name], data[0], direction)
            elif got is not None:
                row.status, row.reason = "failed", first_line(got)
            rows.append(row)
    return rows


def _checked(
    case: Case, training: bool, providers: Sequence[Provider], this: Run
) -> tuple[dict[str, dict[str, Any]], dict[str, nn.Module]]:
    """(fields of every provider's rows, modules of those that are right)."""
    verdicts: dict[str, dict[str, Any]] = {}
    modules: dict[str, nn.Module] = {}
    oracle = accuracy.Oracle(case, this.device, training)
    for provider in providers:
        why = this.faulty.get(provider.name)
        if why is not None:
            verdicts[provider.name] = {"status": "failed", "reason": why}
            continue
        why = this.left_out(provider, case) or provider.refuses(case, this.device, training)
        if why is not None:
            verdicts[provider.name] = {"status": "refused", "reason": why}
            continue
        this.say(Event("provider", f"{'compiling and checking' if _compiles(provider) else 'checking'} {provider.name}"))
        try:
            found = accuracy.errors(provider, case, this.device, training, oracle)
            fields: dict[str, Any] = {"max_err": found.max_err, "err_of_allowed": found.of_allowed}
            if not found.wrong:
                modules[provider.name] = prepare(provider, case, this.device, training=training)
            else:
                fields |= {"status": "wrong", "reason": f"{found.of_allowed:.3g} times the allowed error in {found.worst}"}
            verdicts[provider.name] = fields
        except Exception as error:
            verdicts[provider.name] = {"status": "failed", "reason": first_line(error)}
    return verdicts, modules


def _row(case: Case, mode: str, direction: str, provider: str) -> OperatorRow:
    return OperatorRow(
        case=case.name,
        family=case.family,
        norm=case.norm,
        act=case.act,
        residual=case.residual,
        shape=case.shape,
        layout=case.layout,
        dtype=str(case.dtype).removeprefix("torch."),
        mode=mode,
        direction=direction,
        provider=provider,
        bytes_min=traffic.floor_bytes(case, direction, mode),
    )


def _failed(case: Case, mode: str, direction: str, provider: str, reason: str) -> OperatorRow:
    row = _row(case, mode, direction, provider)
    row.status, row.reason = "failed", reason
    return row


def _fill(row: OperatorRow, figures: Figures, this: Run) -> None:
    vars(row).update(vars(figures))
    us = row.host_us if row.device_us is None else row.device_us
    if us:
        row.gbps = row.bytes_min / us / 1e3
        row.pct_copy = 100 * row.gbps / this.copy_gbps


def _kept(module: nn.Module, given: Inputs) -> int:
    return saved_bytes(module, given.leaves[0], given.leaves[1] if len(given.leaves) > 1 else None)


def _route(provider: Provider, module: nn.Module, given: Inputs, direction: str) -> str | None:
    """Of normfused's cuda backend, as `explain` names it: "single_pass", or "single_pass, two_pass" of forward and backward."""
    if backend_of(provider) != "cuda":
        return None
    plan = dict(line.split(": ", 1) for line in explain(module, *given.leaves).plan)
    routes = [plan[d].split(",")[0] for d in ("forward", "backward") if d in plan and direction in (d, "forward_backward")]
    return ", ".join(dict.fromkeys(routes)) or None


def _device_answers(device: str) -> bool:
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
