"""The Triton backend's own tests: interpreted (TRITON_INTERPRET=1, set before Python starts) or on a GPU.

`test_compile.py` is the opposite: it compiles for GPUs without having one and needs a process that does not interpret.
Everything the backend allocates is filled with NaN first, so that an element nobody writes is seen.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@pytest.fixture
def device() -> torch.device:
    pytest.importorskip("triton", reason="triton is not installed")
    if INTERPRETED:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1 set before Python starts")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*args: Any, _allocate: Any = allocate, **options: Any) -> torch.Tensor:
            out = _allocate(*args, **options)
            return out.fill_(torch.nan) if out.is_floating_point() and out.device.type != "meta" else out

        monkeypatch.setattr(torch, name, poisoned)
