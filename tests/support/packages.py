"""Other packages, for the tests that take them where they are installed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

_TORCHVISION: list[Any] = []


def package(name: str) -> Any:
    """The package, or a skip where it is absent or cannot be imported."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:  # torchvision's build for CUDA beside a CPU torch lacks the operators it describes
        _TORCHVISION.append(torch.library.Library("torchvision", "FRAGMENT"))
        for operator in ("nms", "qnms"):
            _TORCHVISION[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name}: {type(error).__name__}: {error}")
