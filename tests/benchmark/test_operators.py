"""The run of the matrix: who gets figures and who does not, what time does not suffice for, what is kept when it ends early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from normfused import selftest
from normfused.benchmark import operators, timing
from normfused.benchmark.cases import CHANNELS_LAST, MATRIX, Case
from normfused.benchmark.operators import Event
from normfused.benchmark.providers import Provider, eager, ours
from normfused.benchmark.results import PASSES, OperatorRow, Results

CASES = [
    Case("batch", (2, 4, 3, 3), act="relu", dtype=torch.float32),
    Case("group", (2, 4, 3, 3), groups=2, act="silu", dtype=torch.float32, layout=CHANNELS_LAST),
    Case("rms", (4, 6), residual="pre_norm", dtype=torch.float32),
]
ROWS_OF_A_PROVIDER = len(PASSES) + 1  # in training, and forward in eval


class Twisted(nn.Module):
    """Slightly wrong."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, *leaves: torch.Tensor) -> Any:
        out = self.chain(*leaves)
        return (1.01 * out[0], out[1]) if isinstance(out, tuple) else 1.01 * out


def broken(case: Case) -> nn.Module:
    raise RuntimeError("it does not compile\nand here is why")


EAGER = Provider("eager", eager)
OURS = Provider("normfused-torch", ours("torch"))
WRONG = Provider("wrong", lambda case: Twisted(eager(case)))
FAILING = Provider("failing", broken)
PICKY = Provider("picky", eager, None, lambda case, device, training: "no batch norm" if case.norm == "batch" else None)
ABSENT = Provider("absent", broken, "pip install absent")


@pytest.fixture(autouse=True)
def quick_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clocks have tests of their own."""
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-5)
    monkeypatch.setattr(timing, "copy_rate", lambda device: 10e9)


def run(cases: list[Case] = CASES, providers: tuple[Provider, ...] = (EAGER, OURS), **options: Any) -> Results:
    return operators.run(cases, providers, **{"device": "cpu", "rounds": 2, **options})


def rows_of(results: Results, provider: str, case: Case = CASES[0]) -> list[OperatorRow]:
    return [r for r in results.rows if (r.provider, r.case) == (provider, case.name)]


# -------------------------------------------------------------------------------------------------------- who gets figures
def test_every_case_mode_pass_and_provider_has_a_row() -> None:
    results = run()
    assert len(results.rows) == len(CASES) * 2 * ROWS_OF_A_PROVIDER
    assert len({(r.case, r.mode, r.direction, r.provider) for r in results.rows}) == len(results.rows)
    assert {(r.mode, r.direction) for r in results.rows} == {*(("training", d) for d in PASSES), ("eval", "forward")}
    for row in results.rows:
        assert (row.status, row.reason) == ("ok", None)
        assert row.host_us is not None
        assert row.gbps == pytest.approx(row.bytes_min / row.host_us / 1e3)
        assert row.pct_copy == pytest.approx(10 * row.gbps)
        assert row.err_of_allowed is not None
        assert (row.saved_bytes is None) == (row.mode == "eval"), "in eval nothing is kept"
    assert not results.not_run
    assert results.header["copy_gbps"] == 10
    assert results.header["self_test"] == {"normfused-torch": "passed"}


def test_a_wrong_provider_is_shown_and_gets_no_figure() -> None:
    results = run(providers=(EAGER, WRONG, FAILING, PICKY, ABSENT))
    for row in rows_of(results, "wrong"):
        assert row.status == "wrong"
        assert "times the allowed error in" in (row.reason or "")
        assert row.err_of_allowed is not None
        assert row.err_of_allowed > 1
        assert row.host_us is row.gbps is row.saved_bytes is None
    for row in rows_of(results, "failing"):
        assert (row.status, row.reason, row.host_us) == ("failed", "RuntimeError: it does not compile", None)
    assert {(r.status, r.reason) for r in rows_of(results, "picky")} == {("refused", "no batch norm")}
    assert {r.status for r in rows_of(results, "picky", CASES[1])} == {"ok"}
    assert {r.status for r in rows_of(results, "eager")} == {"ok"}, "the others go on"
    assert not rows_of(results, "absent")
    assert results.absent == {"absent": "pip install absent"}
    assert len(rows_of(results, "wrong")) == len(rows_of(results, "failing")) == ROWS_OF_A_PROVIDER


def test_what_fails_while_it_is_timed_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timing.measure

    def measure(modules: Any, data: Any, direction: str, device: str, rounds: int) -> Any:
        found = real(modules, data, direction, device, rounds)
        return found | {"eager": RuntimeError("out of memory")} if direction == "backward" else found

    monkeypatch.setattr(timing, "measure", measure)
    found = {(r.mode, r.direction): r for r in rows_of(run(CASES[:1]), "eager")}
    assert (found["training", "backward"].status, found["training", "backward"].reason) == ("failed", "RuntimeError: out of memory")
    assert found["training", "backward"].host_us is None
    assert found["training", "forward"].status == "ok"


def test_no_figure_of_a_backend_that_fails_its_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "run", lambda backend, device: {"passed": False, "worst_error_of_tolerance": 3.0, "worst_case": "FRN"})
    results = run()
    assert {(r.status, r.reason, r.host_us) for r in rows_of(results, "normfused-torch")} == {
        ("failed", "self-test failed: 3 of the tolerance in FRN", None)
    }
    assert {r.status for r in rows_of(results, "eager")} == {"ok"}


def test_no_memory_for_the_inputs_fails_the_case_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timing.inputs

    def inputs(case: Case, *arguments: Any) -> Any:
        if case.norm == "batch":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return real(case, *arguments)

    monkeypatch.setattr(timing, "inputs", inputs)
    results = run()
    assert {r.reason for r in rows_of(results, "eager")} == {"OutOfMemoryError: CUDA out of memory."}
    assert {r.status for r in rows_of(results, "eager", CASES[1])} == {"ok"}


def test_a_lost_device_ends_the_run_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "_device_answers", lambda device: False)
    results = run()
    assert {r.case for r in results.rows} == {CASES[0].name}
    assert results.not_run == [c.name for c in CASES[1:]]
    assert "--resume" in results.header["interrupted"]


class Twofold(nn.Module):
    """Right with grad, wrong without."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, *leaves: torch.Tensor) -> Any:
        out = self.chain(*leaves)
        return out if torch.is_grad_enabled() else 1.01 * out


def test_what_is_timed_is_what_is_checked() -> None:
    """Without grad a provider may run other kernels."""
    rows = rows_of(run(CASES[:1], (Provider("twofold", lambda case: Twofold(eager(case))),)), "twofold")
    assert {(r.mode, r.status) for r in rows} == {("training", "ok"), ("eval", "wrong")}


def test_a_module_is_made_once_a_mode() -> None:
    made: list[Case] = []

    def make(case: Case) -> nn.Module:
        made.append(case)
        return eager(case)

    run(CASES[:1], (Provider("counted", make),))
    assert len(made) == 2, "one that compiles would compile again"


def test_a_row_outlives_what_is_looked_up_after_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def saved_bytes(*_: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(operators, "saved_bytes", saved_bytes)
    row = rows_of(run(CASES[:1]), "eager")[0]
    assert row.status == "ok"
    assert row.host_us is not None
    assert row.saved_bytes is None
    assert "saved bytes unknown: OutOfMemoryError" in (row.note or "")


# ------------------------------------------------------------------------------------------- time, interruption, going on
def test_compilation_has_a_share_of_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Provider("slow", eager)
    compiled = Provider("compile", eager)
    monkeypatch.setattr(operators, "_SHARE", 0.0)
    limited = run(providers=(slow, compiled), seconds=1000.0)
    assert {r.status for r in rows_of(limited, "slow")} == {"ok", "refused"}, "it takes its time in the first mode"
    assert {r.status for case in CASES[1:] for r in rows_of(limited, "slow", case)} == {"refused"}
    assert "first calls in other cases have taken" in (rows_of(limited, "slow", CASES[1])[0].reason or "")
    assert {r.status for r in rows_of(limited, "compile")} == {"refused"}, "these are no headline cases"
    free = run(providers=(slow, compiled))
    assert {r.status for r in free.rows} == {"ok"}


def test_saving_takes_a_small_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    now = [0.0]  # only saving takes time

    def save(self: Results, path: Path) -> None:
        saved.append(len(self.rows))
        now[0] += 0.2

    monkeypatch.setattr(Results, "save", save)
    monkeypatch.setattr(operators, "time", SimpleNamespace(monotonic=lambda: now[0]))
    results = run(path=tmp_path / "results.json")
    assert saved == [len(results.rows) // 3, len(results.rows)]


def test_what_another_selection_left_is_not_forgotten() -> None:
    first = run(CASES[:1])
    first.not_run = [MATRIX[0].name, "resnet50"]
    assert run(CASES[:1], resume=first).not_run == [MATRIX[0].name]


def test_no_case_is_begun_when_time_is_up() -> None:
    results = run(seconds=0.0)
    assert not results.rows
    assert results.not_run == [c.name for c in CASES]


def interrupt_at(case: Case) -> Callable[[Event], None]:
    def on_event(event: Event) -> None:
        if event.kind == "case" and event.text == case.name:
            raise KeyboardInterrupt

    return on_event


def test_ctrl_c_keeps_what_was_measured_and_another_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    first = run(path=path, on_event=interrupt_at(CASES[1]))
    assert first.header["interrupted"] == "Ctrl-C"
    stored = Results.load(path)
    assert {r.case for r in stored.rows} == {CASES[0].name}
    assert stored.not_run == [c.name for c in CASES[1:]]
    begun: list[str] = []
    second = run(path=path, resume=stored, on_event=lambda e: begun.append(e.text) if e.kind == "case" else None)
    assert begun == [c.name for c in CASES[1:]]
    assert "interrupted" not in second.header
    assert len(second.header["resumed"]) == 1
    assert not second.not_run
    assert len(Results.load(path).rows) == len(CASES) * 2 * ROWS_OF_A_PROVIDER


def test_it_is_saved_after_every_case(tmp_path: Path) -> None:
    path, counts = tmp_path / "deep" / "results.json", []

    def on_event(event: Event) -> None:
        if event.kind == "done":
            counts.append(len(Results.load(path).rows))

    run(path=path, on_event=on_event)
    assert counts == [2 * ROWS_OF_A_PROVIDER * n for n in (1, 2, 3)]


@pytest.mark.parametrize(("key", "value"), [("machine", "another GPU"), ("commit", "0000000"), ("torch", "2.0")])
def test_results_of_another_machine_or_code_are_not_gone_on_with(key: str, value: str) -> None:
    before = run(CASES[:1])
    here = before.header[key]
    before.header[key] = value
    with pytest.raises(operators.CannotResume) as refused:
        run(resume=before)
    assert f"{key}: {value} there, {here} here" in str(refused.value)


def test_results_of_other_providers_are_not_gone_on_with() -> None:
    with pytest.raises(operators.CannotResume, match="providers: .*'eager', 'normfused-torch'.* there, .*'eager'.* here"):
        run(providers=(EAGER,), resume=run(CASES[:1]))


def test_the_guess_gets_better_with_every_case() -> None:
    assert operators.seconds_left([1.0, 2.0, 3.0], 0, 0.0) == 6
    assert operators.seconds_left([1.0, 2.0, 3.0], 1, 4.0) == 4 * 5
    assert operators.seconds_left([1.0, 2.0, 3.0], 3, 4.0) == 0


def test_events_tell_how_far_it_is() -> None:
    events: list[Event] = []
    run(on_event=events.append)
    assert (events[0].kind, events[0].total) == ("start", 3)
    assert (events[0].seconds_left or 0) > 0
    assert [(e.done, len(e.rows)) for e in events if e.kind == "done"] == [(n, 2 * ROWS_OF_A_PROVIDER) for n in (1, 2, 3)]
