"""Options of the benchmark, and what every result is labelled with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._functorch.config

from normfused.benchmark import header, timing
from normfused.benchmark.providers import all_providers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="the small set for CPU machines")
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def on_a_side_stream(device: str) -> Iterator[None]:
    with torch._functorch.config.patch(donated_buffer=False), timing.side_stream(device):
        yield


def pytest_report_header(config: pytest.Config) -> list[str]:
    device = str(config.getoption("--device"))
    absent = [f"  absent: {p.name}: {p.absent}" for p in all_providers(device) if p.absent]
    return [f"normfused benchmark: {header.header(device)}", *absent]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    """The machine in our own words; the host's name is nobody's business."""
    machine_info.clear()
    machine_info.update(header.header(str(config.getoption("--device"))))


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, object]) -> None:
    kept = {k: commit_info.get(k) for k in ("id", "time", "dirty")}
    commit_info.clear()
    commit_info.update(kept)
