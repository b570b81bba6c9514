"""What `torch.compile` and `torch.export` see of a norm: our operators, or ATen's operations in their place.

*Opaque*: a compiled graph holds the operators of `ops.py`, whose kernels are those of eager mode. *Decomposed*: it holds ATen's
operations, which the compiler fuses with their neighbours. An exported program is always decomposed. See docs/compile.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["MODES", "compile_mode", "decomposes", "exporting", "get_compile_mode", "mode_of", "set_compile_mode"]

OPAQUE, DECOMPOSE = "opaque", "decompose"
MODES = ("auto", OPAQUE, DECOMPOSE)


def _known(mode: str, where: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{where}: mode must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


_mode = os.environ.get("NORMFUSED_COMPILE_MODE", "auto").strip().lower() or "auto"  # checked at first use, so that import never fails


def set_compile_mode(mode: str) -> None:
    """Select what compiled code holds of all norms.

    Args:
        mode: ``"opaque"``: normfused's operators, which run the kernels of eager mode. ``"decompose"``: ATen's operations, which the
            compiler fuses with what comes before and after. ``"auto"`` (default): opaque on the backends cuda, triton and reference,
            decomposed on torch.

    The environment variable ``NORMFUSED_COMPILE_MODE`` does the same from outside. Code that is compiled already is compiled anew
    at its next call. `torch.export` and ONNX decompose in every mode. Eager mode is not affected.

    Raises:
        ValueError: unknown mode.
    """
    global _mode
    _mode = _known(mode, "set_compile_mode")


def get_compile_mode() -> str:
    """The mode given to `set_compile_mode` or ``NORMFUSED_COMPILE_MODE`` (``"auto"`` by default)."""
    return _mode


@contextmanager
def compile_mode(mode: str) -> Iterator[None]:
    """``with normfused.compile_mode("decompose"): ...`` selects a mode for a block (process-wide); what counts is when the call is made,
    not `torch.compile`."""
    global _mode
    before = _mode
    set_compile_mode(mode)
    try:
        yield
    finally:
        _mode = before


def mode_of(backend: str) -> str:
    """``"opaque"`` or ``"decompose"``: what compiled code holds of a norm that ``backend`` runs in eager mode."""
    mode = _mode
    if mode == "auto":
        return DECOMPOSE if backend == "torch" else OPAQUE
    return _known(mode, "NORMFUSED_COMPILE_MODE")


def decomposes(backend: str) -> bool:
    """Whether a compiler is at work that is to see ATen's operations in place of ``backend``'s kernels."""
    return torch.compiler.is_compiling() and (exporting() or mode_of(backend) == DECOMPOSE)


def exporting() -> bool:
    """Whether `torch.export` is at work.

    The flag itself: `torch.compiler.is_exporting` says True of whatever Dynamo compiles in torch 2.10 and 2.11.
    """
    return torch.compiler._is_exporting_flag
