"""The one place where kernels are launched, so that a test can see every launch the host code makes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def run(kernel: Any, programs: int, *args: Any, num_warps: int, **constants: Any) -> None:
    kernel[(programs,)](*args, num_warps=num_warps, **constants)


# replaced by tests that record or compile instead of running
launcher = run


def launch(kernel: Any, programs: int, *args: Any, num_warps: int = 4, **constants: Any) -> None:
    """Run ``programs`` programs of ``kernel``; all along axis 0, whose limit is 2^31 - 1."""
    launcher(kernel, programs, *args, num_warps=num_warps, **constants)


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()
