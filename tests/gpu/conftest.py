"""Tests of what only a GPU shows; ``make gpu STAGES=test`` runs them. Those that need no more than kernels also run over the emulation.

Without a GPU they are skipped, with the reason. With NORMFUSED_TEST_DEVICE=cuda, which says that there is one, a backend that cannot
run fails them instead.
"""

from __future__ import annotations

import os

import pytest
import torch

from normfused import dispatch

from ..conftest import EMULATED, ON_GPU


def _why_not(backend: str, device: str) -> str | None:
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA GPU"
    return dispatch.unavailable(backend, device, torch.float32)


@pytest.fixture
def gpu() -> torch.device:
    """A GPU on which the CUDA kernels run."""
    if os.environ.get("TRITON_INTERPRET") == "1" or EMULATED:
        pytest.skip("needs a GPU, not a stand-in for one")
    reason = _why_not("cuda", "cuda")
    if reason is not None:
        (pytest.fail if ON_GPU else pytest.skip)(reason)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, or the CPU where kernels are emulated."""
    return torch.device("cpu") if EMULATED else request.getfixturevalue("gpu")


@pytest.fixture(params=["cuda", "triton"])
def fused(request: pytest.FixtureRequest, device: torch.device) -> str:
    """A backend with kernels of its own."""
    reason = _why_not(request.param, device.type)
    if reason is not None:
        (pytest.fail if ON_GPU else pytest.skip)(reason)
    return request.param
