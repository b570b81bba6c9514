"""The place of the CUDA C++ kernels (csrc/). They are not part of this version; the dispatch says so and goes on."""

from __future__ import annotations

import torch


def unavailable(device_type: str, dtype: torch.dtype) -> str | None:
    return "the CUDA C++ kernels are not part of this version of normfused"
