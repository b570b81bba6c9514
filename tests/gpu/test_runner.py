"""bench.gpu itself, which must not fail where a GPU is lent by the minute: limits, what goes on after a failure, the record. No GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from bench.gpu import counters, runner
from bench.gpu import stages as catalogue
from bench.gpu.runner import Command, Outcome, Stage
from normfused.benchmark.cases import Case

ROOT = Path(__file__).parents[2]


def python(name: str, code: str, limit: float = 60.0, **environment: str) -> Command:
    return Command(name, (sys.executable, "-c", code), environment, limit)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE", 0.3)


def run(tmp_path: Path, *stages: Stage, every: float = 15.0) -> tuple[list[Outcome], list[str]]:
    said: list[str] = []
    return runner.run_stages(stages, tmp_path / "logs", tmp_path / "out", said.append, every), said


def test_a_failure_stops_nothing(tmp_path: Path) -> None:
    bad = Stage("bad", (python("fails", "print('so and so'); raise SystemExit(3)"), Command("absent", ("/no/such/program",))), 60)
    good = Stage("good", (python("says", "print('headline: 7 of 7')\nprint('more')"),), 60)
    outcomes, said = run(tmp_path, bad, good)
    assert [(o.stage, o.command, o.status, o.headline) for o in outcomes[::2]] == [
        ("bad", "fails", "failed (3)", "so and so"),
        ("good", "says", "ok", "7 of 7"),
    ]
    assert outcomes[1].status == "cannot start"
    assert [o.ok for o in outcomes] == [False, False, True]
    assert any("[good] says: ok" in line for line in said)


def test_time_is_limited(tmp_path: Path) -> None:
    """Also for what ignores signals, and for children that hold the output open."""
    ignore = "import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)]"
    stubborn = f"{ignore}; print('here', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {stubborn!r}]); time.sleep(60)"
    started = time.monotonic()
    outcomes, said = run(tmp_path, Stage("s", (python("parent", parent, 1.5), python("next", "print(1)")), 60), every=0.5)
    assert time.monotonic() - started < 15
    assert [o.status for o in outcomes] == ["timed out", "ok"]
    assert any("here" in line for line in said), "its last line is shown while it runs"
    left = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(ignore.encode() in line and b"subprocess" not in line for line in left)


def test_an_interrupted_program_may_finish_its_report(tmp_path: Path) -> None:
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('headline: half of it', flush=True)"
    (outcome,), _ = run(tmp_path, Stage("s", (python("polite", code, 1.0),), 60))
    assert (outcome.status, outcome.headline) == ("timed out", "half of it")


def test_a_stage_has_a_limit_of_its_own(tmp_path: Path) -> None:
    sleep = python("long", "import time; time.sleep(60)", 50)
    outcomes, _ = run(tmp_path, Stage("s", (sleep, python("second", "print(1)")), 0.5), Stage("t", (python("third", "print(1)"),), 60))
    assert [o.status for o in outcomes] == ["timed out", "not run", "ok"]


def test_a_command_is_told_the_seconds_that_are_left(tmp_path: Path) -> None:
    """A benchmark behind a long build has to end earlier, or nothing of it comes back."""
    tell = Command("tell", (sys.executable, "-c", "print('{seconds}')"), {}, limit=50.0, spare=20.0)
    slow = python("slow", "import time; time.sleep(1.2)")
    (alone,), _ = run(tmp_path, Stage("s", (tell,), 50.0))
    assert alone.headline == "30"
    outcomes = runner.run_stages([Stage("s", (slow, tell), 60.0)], tmp_path / "logs", tmp_path / "out", lambda text: None, within=40.0)
    assert 15 <= int(outcomes[1].headline) <= 19
    outcomes = runner.run_stages([Stage("s", (slow, tell), 60.0)], tmp_path / "logs", tmp_path / "out", lambda text: None, within=0.5)
    assert [(o.status, o.headline) for o in outcomes[1:]] == [("not run", "all 0 s were over")]


def test_the_record(tmp_path: Path) -> None:
    """Three files; a stage that runs again replaces its own part only."""
    out = tmp_path / "out"
    code = "import json, os; open(os.environ['RESULT_FILE'], 'w').write(json.dumps({'x': int(os.environ['X']), 'markdown': '## Table'}))"
    run(tmp_path, Stage("a", (python("one", code, X="1"),), 60), Stage("b", (python("two", code, X="2"),), 60))
    run(tmp_path, Stage("b", (python("two", code, X="3"),), 60))
    found = json.loads((out / "results.json").read_text())
    assert (found["a"]["one"]["result"]["x"], found["b"]["two"]["result"]["x"]) == (1, 3)
    assert found["b"]["two"]["status"] == "ok"
    summary = (out / "summary.md").read_text()
    assert summary.count("## Table") == 2
    assert "| a     | one     | ok" in summary
    with zipfile.ZipFile(out / "logs.zip") as archive:
        assert {"a-one.log", "b-two.log"} <= set(archive.namelist())
        assert b"RESULT_FILE" in archive.read("a-one.log"), "a log begins with its command"
    assert sorted(p.name for p in out.iterdir()) == ["logs.zip", "results.json", "summary.md"]


def test_no_result_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "s-c.json").write_text("1")
    (outcome,), _ = run(tmp_path, Stage("s", (python("c", "raise SystemExit(1)"),), 60))
    assert outcome.result is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a\nheadline: b\nc\n", "b"),
        ("headline: a\nheadline: b\n", "b"),
        ("...\n==== 12 passed, 1 failed in 3.00s ====\n\n", "12 passed, 1 failed in 3.00s"),
        ("", ""),
    ],
)
def test_headlines(text: str, found: str) -> None:
    assert runner.headline(text) == found


# ------------------------------------------------------------------------------------------------------------- the stages
def command_line(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("OUT", "CUDA_VISIBLE_DEVICES")}
    full = {**kept, "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([sys.executable, "-m", "bench.gpu", *arguments], cwd=ROOT, env=full, capture_output=True, text=True, check=False)


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = command_line("facts")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "needs a CUDA GPU" in done.stderr


def test_it_shows_what_it_would_run() -> None:
    done = command_line("--dry")
    assert done.returncode == 0
    for name in catalogue.NAMES:
        assert f"{name}: at most" in done.stdout
    assert "NORMFUSED_TEST_DEVICE=cuda" in done.stdout
    for tool in catalogue.SANITIZERS:
        assert f"--tool {tool}" in done.stdout


def test_an_unknown_stage() -> None:
    done = command_line("tests")
    assert done.returncode == 2
    assert "unknown stage tests" in done.stderr


def test_each_stage_fits_ten_minutes() -> None:
    patience = 30  # to import torch, and to end what does not end by itself
    assert all(limit <= 600 - patience for limit in catalogue.LIMITS.values())
    for stage in catalogue.stages(catalogue.NAMES, Path("x")):
        assert stage.commands
        assert all(command.limit <= stage.limit for command in stage.commands)


def test_files_that_need_what_is_absent_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "present", lambda module: False)
    command = catalogue.suite("norms", ["tests/norms"], Path("x"), {}, 60)
    assert "--ignore=tests/norms/test_edges.py" in command.argv
    assert "hypothesis" in command.note
    assert "-n" not in command.argv


@pytest.mark.slow
def test_the_benchmark_goes_on_with_its_file(tmp_path: Path) -> None:
    """The commands of the stages bench and matrix as they are, on the CPU: two cases in one file, which the record keeps."""
    chosen = catalogue.stages(["bench", "matrix"], tmp_path, "cpu")
    outcomes = runner.run_stages(chosen, tmp_path, tmp_path / "out", lambda text: None)
    found = json.loads((tmp_path / "out" / catalogue.RESULTS).read_text())
    assert [o.status for o in outcomes] == ["ok", "ok"]
    assert {row["norm"] for row in found["rows"]} == {"batch", "rms"}


# ---------------------------------------------------------------------------------------------------------------- ncu
def _line(number: int, kernel: str, metric: str, unit: str, value: str) -> str:
    cells = (
        str(number),
        "1",
        "python3",
        "host",
        kernel,
        "1",
        "7",
        "(1, 1, 1)",
        "(1, 1, 1)",
        "0",
        "9.0",
        "Command line",
        metric,
        unit,
        value,
    )
    return ",".join(f'"{cell}"' for cell in cells)


COLUMNS = "ID,Process ID,Process Name,Host Name,Kernel Name,Context,Stream,Block Size,Grid Size,Device,CC,Section Name,Metric Name"
FORWARD = "void normfused::single_pass_kernel<__nv_bfloat16, true, true, 1>(normfused::Call)"
BACKWARD = "void normfused::grad_single_pass_kernel<float, true, true, 1>(normfused::Call)"
NCU = "\n".join(
    [
        "==PROF== Connected to process 1",
        ",".join(f'"{name}"' for name in [*COLUMNS.split(","), "Metric Unit", "Metric Value"]),
        _line(0, "at::cuda::(anonymous namespace)::spin_kernel(long)", "dram__bytes_read.sum", "byte", "0"),
        _line(1, FORWARD, "dram__bytes_read.sum", "byte", "50,000,000"),
        _line(1, FORWARD, "dram__bytes_write.sum", "Mbyte", "50"),
        _line(1, FORWARD, "gpu__time_duration.sum", "ns", "25000"),
        _line(2, "spin_kernel(long)", "dram__bytes_read.sum", "byte", "0"),
        _line(3, BACKWARD, "dram__bytes_read.sum", "byte", "7"),
    ]
)


def test_what_ncu_writes() -> None:
    kernels = counters.parse(NCU)
    assert len(kernels) == 4
    assert kernels[1]["kernel"].startswith("single_pass_kernel")
    assert (kernels[1]["read"], kernels[1]["written"], kernels[1]["us"]) == (50e6, 50e6, 25.0)
    case = Case("batch", (10, 50, 500, 100))
    forward, backward = counters.by_direction(kernels, [case])
    assert forward["of_floor"] == 1.0
    assert [k["kernel"].split("<")[0] for k in backward["kernels"]] == ["grad_single_pass_kernel"]
    assert "| 100.0 | 100.0 | 1.00 | single_pass 50.0 + 50.0 |" in counters.markdown([forward, backward])
    with pytest.raises(ValueError, match="2 groups of kernels for 4"):
        counters.by_direction(kernels, [case, case])


def test_why_ncu_measured_nothing() -> None:
    assert counters.parse("==ERROR== The user does not have permission") == []
    assert counters.why_not("==PROF== x\n==ERROR== ERR_NVGPUCTRPERM: no permission\n").startswith("ERR_NVGPUCTRPERM")
    assert counters.why_not("Failed to initialize the profiler: LibraryNotLoaded") == "Failed to initialize the profiler: LibraryNotLoaded"
    assert counters.why_not("") == "it wrote no kernels"
