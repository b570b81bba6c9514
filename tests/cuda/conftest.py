"""The CUDA backend's own tests run on a GPU with the extension, or with ``NORMFUSED_EMULATE=1`` on the emulation; else they are skipped."""

from __future__ import annotations

import pytest
import torch

from normfused.backends import cuda

from ..conftest import EMULATED
from .cases import Machine

DEVICE = torch.device("cpu" if EMULATED else "cuda")


@pytest.fixture(scope="session")
def device() -> torch.device:
    reason = cuda.unavailable(DEVICE.type, torch.float32)
    if reason is not None:
        if EMULATED:
            pytest.fail(reason)
        pytest.skip(reason)
    return DEVICE


@pytest.fixture(scope="session")
def machine(device: torch.device) -> Machine:
    if not EMULATED:
        pytest.skip("of the emulation")
    return Machine()
