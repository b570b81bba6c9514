"""Options of the benchmark, and what every result is labelled with."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

import normfused
from normfused.benchmark.providers import all_providers
from normfused.benchmark.timing import copy_rate, time_on_device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="the small set for CPU machines")
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def labels(device: str) -> dict[str, object]:
    root = Path(__file__).parent.parent
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    about: dict[str, object] = {
        "device": device,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "torch": torch.__version__,
        "normfused": normfused.__version__,
        "commit": commit or None,
    }
    if device == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda}
    return about


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    name = str(request.config.getoption("--device"))
    time_on_device(name)
    return name


@pytest.fixture(scope="session")
def ceiling(device: str) -> float:
    """Copy rate of this process, bytes a second."""
    return copy_rate(device)


def pytest_report_header(config: pytest.Config) -> list[str]:
    device = str(config.getoption("--device"))
    absent = [f"  absent: {p.name}: {p.absent}" for p in all_providers(device) if p.absent]
    return [f"normfused benchmark: {labels(device)}", *absent]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    """The machine in our own words; the host's name is nobody's business."""
    machine_info.clear()
    machine_info.update(labels(str(config.getoption("--device"))))


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, object]) -> None:
    kept = {k: commit_info.get(k) for k in ("id", "time", "dirty")}
    commit_info.clear()
    commit_info.update(kept)
