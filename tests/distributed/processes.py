"""Runs functions in a few processes of one gloo group, once for all tests: starting a process costs more than most of what it tests.

Every process runs all cases in the same order. A case that fails in one process fails the test of its name, and ends the process,
as the others may stand in another exchange by then; what comes after it fails too.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

SIZE = 3
SECONDS = 40


def _process(rank: int, rendezvous: str, module: str, answers: multiprocessing.SimpleQueue) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=SIZE, timeout=timedelta(seconds=SECONDS)
    )
    cases: dict[str, Callable[[int], None]] = importlib.import_module(module).CASES
    for name, case in cases.items():
        torch.manual_seed(0)
        try:
            case(rank)
            answers.put((name, rank, None))
        except BaseException:
            answers.put((name, rank, traceback.format_exc()))
            os._exit(1)
    distributed.barrier()
    distributed.destroy_process_group()


def run(module: str, folder: Path) -> dict[str, list[str]]:
    """What failed, by case: a traceback for each process in which it did; a process that ended without an answer is told too."""
    names = list(importlib.import_module(module).CASES)
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    started = [
        context.Process(target=_process, args=(rank, str(folder / "rendezvous"), module, answers), daemon=True) for rank in range(SIZE)
    ]
    for process in started:
        process.start()
    failed: dict[str, list[str]] = {name: [] for name in names}
    missing = {(name, rank) for name in names for rank in range(SIZE)}
    while missing and (not answers.empty() or any(process.is_alive() for process in started)):
        if answers.empty():
            started[0].join(0.02)
            continue
        name, rank, error = answers.get()
        missing.discard((name, rank))
        if error:
            failed[name].append(f"process {rank}:\n{error}")
    for name, rank in missing:
        failed[name].append(f"process {rank} ended before it (exit code {started[rank].exitcode})")
    for process in started:
        process.join(5)
        process.kill()
    return failed
