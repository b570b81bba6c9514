"""`python -m normfused bench` from outside: what it prints, where it writes, and how it refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from normfused import __main__ as doctor
from normfused import _build
from normfused.benchmark import command, networks, operators, report, screen
from normfused.benchmark.cases import QUICK, Case
from normfused.benchmark.operators import Event
from normfused.benchmark.providers import names
from normfused.benchmark.results import NetworkRow, OperatorRow, Results

TINY = ["--op", "bn_relu", "--shape", "2x4x5x5", "--device", "cpu", "--providers", "eager", "normfused-torch", "--rounds", "1"]


def bench(*arguments: str | Path) -> int:
    return doctor.main(["bench", *map(str, arguments)])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were installed, so that no test writes into the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_build, "checkout", lambda: None)


# ------------------------------------------------------------------------------------------------------------------- runs
def test_one_operator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "x.json"
    assert bench(*TINY, "--json", path) == 0
    said = capsys.readouterr().out
    found = Results.load(path)
    assert {r.provider for r in found.rows} == {"eager", "normfused-torch"}
    assert "Results: new/x.json" in said
    assert "training forward + backward" in said
    assert said.strip().splitlines()[-1].startswith("headline: normfused, forward + backward: ")
    assert "\x1b" not in said, "nobody watches: plain text"


def test_results_never_replace_others(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert bench(*TINY, "--directions", "forward", "--modes", "eval") == 0
    first, second = sorted(Path("normfused-bench").glob("*/*.json"), key=lambda path: len(path.name))
    assert second.stem == f"{first.stem}-2"


def test_a_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    assert bench(*TINY, "--resume", path) == 0
    assert "is not there yet: it is begun" in capsys.readouterr().out
    rows = len(Results.load(path).rows)
    assert bench(*TINY, "--resume", path) == 0
    assert len(Results.load(path).rows) == rows
    stored = Results.load(path)
    stored.header["machine"] = "another"
    stored.save(path)
    capsys.readouterr()
    assert bench(*TINY, "--resume", path) == 2
    assert "machine: another there" in capsys.readouterr().err


def test_a_budget_leaves_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    assert bench("--quick", "--device", "cpu", "--parts", "operators", "--seconds", "0", "--json", path) == 0
    assert Results.load(path).not_run == [c.name for c in QUICK]
    assert f"{len(QUICK)} cases or networks were not run" in capsys.readouterr().out


def test_ctrl_c_keeps_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(operators, "measure_case", stop)
    path = tmp_path / "x.json"
    assert bench(*TINY, "--json", path) == 130
    assert "what was measured is kept" in capsys.readouterr().out
    assert Results.load(path).header["interrupted"] == "Ctrl-C"


def test_a_wrong_figure_of_normfused_is_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operators, "self_tests", lambda providers, device: {"normfused-torch": "self-test failed: FRN"})
    assert bench(*TINY, "--json", tmp_path / "x.json") == 1
    assert "failed: self-test failed: FRN" in capsys.readouterr().out


def test_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One that time did not suffice for is not a result, and is tried again; one that is in the file is not."""
    asked: list[list[str]] = []

    def run(given: list[str], *, on_row: Any, **options: Any) -> None:
        asked.append(list(given))
        for name in given:
            late = name == "nnunet" and len(asked) == 1
            for norms, ms in (("torch.nn", 3.0), ("normfused", 2.0)):
                row = NetworkRow(name, 2, (2, 3, 8, 8), "contiguous", "float32", "training", norms, "eager", step_ms=None if late else ms)
                row.status, row.reason = ("refused", "no time") if late else ("ok", None)
                on_row(row)

    monkeypatch.setattr(networks, "run", run)
    path = tmp_path / "x.json"
    arguments = ("--device", "cpu", "--model", "cyclegan", "nnunet", "--providers", "eager", "--resume", path)
    assert bench(*arguments) == 0
    assert Results.load(path).not_run == ["nnunet"]
    assert "headline: networks 1.50 times as fast as with torch.nn's norms" in capsys.readouterr().out
    assert bench(*arguments) == 0
    assert asked == [["cyclegan", "nnunet"], ["nnunet"]]
    assert len(Results.load(path).networks) == 4
    assert not Results.load(path).not_run


def test_the_report_is_written_beside_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(report, "write", lambda files, docs, pictures: asked.append((files, docs, pictures)) or [docs / "performance.md"])
    assert bench(*TINY, "--json", tmp_path / "x.json", "--plot") == 0
    assert asked == [([tmp_path / "x.json"], tmp_path / "x", tmp_path / "x" / "pictures")]
    monkeypatch.setattr(report, "main", lambda arguments: asked.append(arguments) or 0)
    assert bench("report", "--out", "there") == 0
    assert asked[-1] == ["--out", "there"]


# ---------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--op", "bn_relu"], "--op and --shape go together"),
        (["--op", "nosuch", "--shape", "2x4x5x5"], "nosuch"),
        (["--op", "bn_relu", "--shape", "2xfour"], "2xfour"),
        (["--op", "bn_relu", "--shape", "2x4x5x5", "--providers", "eagr"], "unknown provider eagr; known: eager"),
        (["--op", "bn_relu", "--shape", "2x4x5x5", "--providers", "normfused-cuda"], "normfused-cuda is absent"),
        (["--model", "resnet5000"], "unknown network resnet5000; known:"),
        (["--quick", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--model", "cyclegan", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["--quick", "--plot", "/proc/no"], "the report cannot be written to /proc/no: "),
        (["--quick", "--json", "."], "cannot be written to .: it is a folder"),
        (["--quick", "--json", "/proc/no/x.json"], "cannot be written to /proc/no/x.json"),
    ],
)
def test_users_errors_are_one_sentence(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "normfused-cuda" in arguments and all(p.absent is None for p in command.all_providers("cpu", ["normfused-cuda"])):
        pytest.skip("the emulation is here, so that this backend is")
    assert bench(*arguments, "--device", "cpu") == 2
    printed = capsys.readouterr()
    assert text in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.err.startswith("bench: ")


@pytest.mark.parametrize(
    ("arguments", "text"), [([], "no results in normfused-bench"), (["nosuch.json"], "report: nosuch.json: No such file or directory")]
)
def test_a_report_of_nothing(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("report", *arguments) == 2
    assert text in capsys.readouterr().err
    assert not Path("performance.md").exists()


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("--device", "cuda") == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_a_file_that_is_none_is_not_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    assert bench(*TINY, "--resume", path) == 2
    assert str(path) in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ what is shown
def test_the_list_has_everybody(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--list", "--device", "cpu") == 0
    said = capsys.readouterr().out
    for name in (*names(), *networks.NETWORKS, *(c.name for c in QUICK)):
        assert name in said


def rows() -> list[OperatorRow]:
    def row(provider: str, us: float | None, **more: Any) -> OperatorRow:
        shape = {
            "family": "",
            "norm": "batch",
            "act": "relu",
            "residual": None,
            "shape": (2, 4),
            "layout": "contiguous",
            "dtype": "float32",
        }
        return OperatorRow(case="a case", **shape, mode="training", direction="forward", provider=provider, host_us=us, **more)  # type: ignore[arg-type]

    return [
        row("eager", 30.0),
        row("normfused-torch", 20.0, saved_bytes=2_000_000, err_of_allowed=0.25),
        row("compile", None, status="wrong", reason="7 times the allowed error in dx"),
        row("timm", None, status="refused", reason="no layer"),
    ]


def test_the_table_shows_what_is_wrong_and_no_figure_of_it() -> None:
    found = {line[2]: line for line in screen.cells(screen.comparisons(Results({"device": "cpu"}, rows())))}
    assert found["normfused-torch"][3:5] == ("1.50x", "20.0")
    assert found["normfused-torch"][-2:] == ("2.00", "0.25")
    assert found["compile"][3] == "wrong: 7 times the allowed error in dx"
    assert not any(found["compile"][4:])
    assert "timm" not in found


def test_many_cases_have_a_line_each_and_details_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    other = [replace(r, case="other", shape=(4, 4, 5, 5)) for r in rows()]
    results = Results({"device": "cpu"}, [*rows(), *other])
    screen.Screen().tables(results)
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[1] == "Training, forward, medians"
    assert [line.split()[-2:] for line in lines[3:5]] == [["20.0", "1.50x"]] * 2
    assert "wrong: compile, " in said
    assert max(map(len, lines)) <= 100
    screen.Screen().tables(results, details=True)
    assert "training forward" in capsys.readouterr().out


def test_networks_stand_beside_torch_nn() -> None:
    pair = [
        NetworkRow("nnunet", 2, (2, 1, 8, 8, 8), "contiguous", "float32", "training", norms, "eager", step_ms=ms)
        for norms, ms in (("normfused", 2.0), ("torch.nn", 3.0))
    ]
    first, second = screen.network_cells(Results({"device": "cpu"}, networks=pair))
    assert (first[6:9], second[6:9]) == (("torch.nn", "3.00", ""), ("normfused", "2.00", "1.50x"))


def test_a_restless_machine_is_told_of() -> None:
    def of(spread: float) -> str | None:
        return screen.unsteady(Results({}, [replace(r, spread=spread) for r in rows()]))

    assert of(0.02) is None
    assert "The rounds differ by 40%" in (of(0.4) or "")


def test_the_line_of_a_case() -> None:
    event = Event("done", "a case: 2.0 s", 1, 3, 250.0, rows())
    assert screen.line(event, "cpu") == "[1/3, 4 min left] a case: 2.0 s; normfused-torch 1.50x, compile wrong"


@pytest.mark.parametrize("installed", [True, False])
def test_somebody_who_watches_needs_no_rich(installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    if installed:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    shown = screen.Screen()
    assert (shown.console is not None) == installed
    with shown.progress("cpu") as on_event:
        on_event(Event("start", "3 cases", 0, 3, 30.0))
        on_event(Event("done", "a case: 2.0 s", 1, 3, 20.0, rows()))
    shown.tables(Results({"device": "cpu"}, rows()))
    said = capsys.readouterr().out
    assert "About 30 s for 3 cases" in said
    assert "1.50x" in said
    assert "wrong: 7 times" in said


def test_the_quick_set_says_what_it_leaves_out() -> None:
    options = command._parser().parse_args(["--quick"])
    why = command._left_out(options, "cpu")
    (compiled,) = command.all_providers("cpu", ["compile"])
    small = Case("batch", (2, 4, 5, 5), dtype=torch.float32)
    assert "--providers" in (why(compiled, small) or "")
    assert why(compiled, Case("batch", (16, 64, 56, 56), dtype=torch.float32)) is None
    assert command._left_out(command._parser().parse_args(["--quick", "--providers", "compile"]), "cpu")(compiled, small) is None
