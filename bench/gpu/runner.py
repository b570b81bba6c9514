"""Runs stages: commands with time limits, one after another, whether or not those before them failed. Knows nothing of GPUs.

A command's output goes to a file, so that a process which outlives its parent cannot hold anything up, and its last line is shown
from time to time. What a command wants in the final table it prints as its last ``headline: ...``; without one it is the last line.
A command that has results for the record writes JSON where RESULT_FILE says.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GRACE = 10.0  # seconds that a process has after its time is up


@dataclass(frozen=True)
class Command:
    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    limit: float = 600.0  # seconds
    note: str = ""  # what the reader of the log should know, such as what is left out

    def __str__(self) -> str:
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.argv)])


@dataclass(frozen=True)
class Stage:
    """``limit`` is the seconds that all its commands together may take; one that finds none left is not run."""

    name: str
    commands: tuple[Command, ...]
    limit: float


@dataclass(frozen=True)
class Outcome:
    stage: str
    command: str
    status: str  # ok | failed (N) | timed out | not run | cannot start
    seconds: float
    headline: str
    result: Any = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def headline(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line.removeprefix("headline:").strip() for line in lines if line.startswith("headline:")]
    return (said or lines or [""])[-1].strip("= ")[:200]


def run_command(stage: str, command: Command, folder: Path, limit: float, say: Callable[[str], None], every: float = 15.0) -> Outcome:
    log, result = folder / f"{stage}-{command.name}.log", folder / f"{stage}-{command.name}.json"
    result.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "RESULT_FILE": str(result), **command.environment}
    say(f"[{stage}] {command.name}: at most {limit:.0f} s" + (f"; {command.note}" if command.note else ""))
    started = time.monotonic()
    with log.open("w") as out:
        out.write(f"$ {command}\n" + (f"# {command.note}\n" if command.note else ""))
        out.flush()
        try:
            # its own session, so that its children end with it
            process = subprocess.Popen(
                command.argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        except OSError as error:
            out.write(f"{error}\n")
            return Outcome(stage, command.name, "cannot start", 0.0, str(error))
        try:
            timed_out = _wait(process, started, limit, log, lambda text: say(f"[{stage}]   {text}"), every)
        except BaseException:  # Ctrl-C: the session of its own would live on
            _end(process)
            raise
    text = log.read_text(errors="replace")
    status = "timed out" if timed_out else "ok" if process.returncode == 0 else f"failed ({process.returncode})"
    return Outcome(stage, command.name, status, time.monotonic() - started, headline(text), _read_json(result))


def _wait(process: subprocess.Popen[bytes], started: float, limit: float, log: Path, say: Callable[[str], None], every: float) -> bool:
    """Until it ends or its time is up; then it is ended, and the answer is True."""
    while (left := limit - (time.monotonic() - started)) > 0:
        try:
            process.wait(min(every, left))
            return False
        except subprocess.TimeoutExpired:
            say(f"{time.monotonic() - started:4.0f} s  {_last_line(log)}")
    _end(process)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and its children, first politely: pytest, interrupted, still writes what it has."""
    for number, patience in ((signal.SIGINT, GRACE), (signal.SIGTERM, GRACE / 2), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:  # after SIGKILL: stuck in the driver; it is left behind
            continue
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # children that ignored the first signal


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip()[-120:] for line in reversed(lines) if line.strip()), "")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def table(outcomes: Sequence[Outcome]) -> str:
    rows = [("stage", "command", "result", "seconds", "headline")]
    rows += [(o.stage, o.command, o.status, f"{o.seconds:.0f}", o.headline.replace("|", "/")) for o in outcomes]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["| " + " | ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) + " |" for row in rows]
    return "\n".join([lines[0], "|---|---|---|---|---|", *lines[1:]])


def record(outcomes: Sequence[Outcome], folder: Path, out: Path) -> None:
    """results.json, summary.md, logs.zip and files of results; after every command, so that they are there whatever comes next.

    Stages that were run another time keep their results.
    """
    out.mkdir(parents=True, exist_ok=True)
    ran = {o.stage for o in outcomes}
    before = _read_json(out / "results.json") or {}
    found = {name: kept for name, kept in before.items() if name not in ran}
    for o in outcomes:
        found.setdefault(o.stage, {})[o.command] = {
            "status": o.status, "seconds": round(o.seconds, 1), "headline": o.headline, "result": o.result,
        }  # fmt: skip
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    everything = [
        Outcome(stage, name, c["status"], c["seconds"], c["headline"]) for stage, commands in found.items() for name, c in commands.items()
    ]
    texts = [
        c["result"]["markdown"]
        for commands in found.values()
        for c in commands.values()
        if isinstance(c["result"], dict) and "markdown" in c["result"]
    ]
    (out / "summary.md").write_text("\n\n".join(["# On a GPU", table(everything), *texts]) + "\n")
    with zipfile.ZipFile(out / "logs.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.glob("*")):
            if path.suffix in (".log", ".xml", ".txt"):
                archive.write(path, path.name)
    for path in folder.glob("benchmark*.json"):
        shutil.copy(path, out)


def run_stages(stages: Sequence[Stage], folder: Path, out: Path, say: Callable[[str], None], every: float = 15.0) -> list[Outcome]:
    """All stages in their order. Nothing that a command does ends the others."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for stage in stages:
        started = time.monotonic()
        for command in stage.commands:
            left = min(command.limit, stage.limit - (time.monotonic() - started))
            if left <= 0:
                outcome = Outcome(stage.name, command.name, "not run", 0.0, f"the stage's {stage.limit:.0f} s were over")
            else:
                outcome = run_command(stage.name, command, folder, left, say, every)
            say(f"[{stage.name}] {command.name}: {outcome.status}, {outcome.seconds:.0f} s: {outcome.headline}")
            outcomes.append(outcome)
            record(outcomes, folder, out)
    return outcomes
