"""Who runs a call: ordered backends, each of which answers None or the reason why it cannot.

auto = cuda, triton, torch (`reference` only when named). A backend that was named and cannot run raises with its reason;
it never falls back silently. `explain` prints the same table.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from .backends import cuda as _cuda
from .backends import reference as _reference
from .backends import torch as _torch
from .backends import triton as _triton

__all__ = ["BACKENDS", "available_backends", "backend", "choose", "get_backend", "load", "reasons", "set_backend"]

BACKENDS = ("cuda", "triton", "torch", "reference")
_AUTO = ("cuda", "triton", "torch")
_log = logging.getLogger("normfused")


def _known(name: str, where: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{where}: unknown backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    return name


_environment = os.environ.get("NORMFUSED_BACKEND", "auto").strip().lower() or "auto"
_selected = _environment  # checked at first use, so that import never fails
# imported with the package, since Dynamo would not import one in compiled code; libraries and kernels wait for their first use
_modules: dict[str, ModuleType] = {"cuda": _cuda, "triton": _triton, "torch": _torch, "reference": _reference}
_reasons: dict[tuple[str, str, torch.dtype], str | None] = {}
_chosen: dict[tuple[str, torch.dtype], str] = {}


def set_backend(name: str) -> None:
    """Select the backend of all later calls: ``"auto"``, ``"cuda"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    The environment variable ``NORMFUSED_BACKEND`` does the same from outside; a layer's or a call's ``backend=`` wins over both.

    Raises:
        ValueError: unknown name. Whether a named backend can run is found out, and raised, by the call that needs it.
    """
    global _selected
    _selected = _known(name, "set_backend")


def get_backend() -> str:
    """The name given to `set_backend` or ``NORMFUSED_BACKEND`` (``"auto"`` by default)."""
    return _selected


@contextmanager
def backend(name: str) -> Iterator[None]:
    """``with normfused.backend("triton"): ...`` selects a backend for a block (process-wide, like torch's own flags)."""
    global _selected
    before = _selected
    set_backend(name)
    try:
        yield
    finally:
        _selected = before


def load(name: str) -> ModuleType:
    """The backend module called ``name``."""
    return _modules[name]


def unavailable(name: str, device_type: str, dtype: torch.dtype) -> str | None:
    """None if backend ``name`` can run there, else a sentence with the reason."""
    key = (name, device_type, dtype)
    if key not in _reasons:
        try:
            _reasons[key] = load(name).unavailable(device_type, dtype)
        except Exception as error:  # a backend that cannot even answer must not stop the others
            _reasons[key] = f"it failed to load ({type(error).__name__}: {error})"
    return _reasons[key]


def reasons(device_type: str, dtype: torch.dtype) -> dict[str, str | None]:
    """For every backend, None or why it cannot run (for auto: why it is not considered)."""
    return {name: unavailable(name, device_type, dtype) for name in BACKENDS}


def choose(device_type: str, dtype: torch.dtype, named: str | None = None) -> str:
    """The backend for a tensor; ``named`` overrides the selected one.

    Raises:
        ValueError: unknown name.
        RuntimeError: a named backend cannot run, with its reason.
    """
    return _resolve(device_type, dtype, named or _selected, "backend" if named else "NORMFUSED_BACKEND")


def _resolve(device_type: str, dtype: torch.dtype, name: str, where: str) -> str:
    if name != "auto":
        _known(name, where)
        reason = unavailable(name, device_type, dtype)
        if reason is not None:
            raise RuntimeError(f"normfused: backend {name!r} was asked for and cannot run: {reason}")
        return name
    found = _chosen.get((device_type, dtype))
    if found is None:
        found = _chosen[device_type, dtype] = _choose_auto(device_type, dtype)
    return found


# To Dynamo a constant, found when it traces a call: what it would follow is the loading of libraries, and it would compile anew
# whenever another type is asked for. `torch.compiler.assume_constant_result` sets the same, but imports Dynamo, for a second or more.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose_auto(device_type: str, dtype: torch.dtype) -> str:
    if device_type != "cuda":  # the other two are for CUDA tensors; interpreted Triton runs only when it is named
        return "torch"
    answers = {name: unavailable(name, device_type, dtype) for name in _AUTO}
    found = next(name for name, reason in answers.items() if reason is None)
    why = "; ".join(f"not {name}: {reason}" for name, reason in answers.items() if reason is not None)
    _log.info("normfused: backend %s for %s %s%s", found, device_type, dtype, f" ({why})" if why else "")
    return found


def available_backends(device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> list[str]:
    """Names of the backends that can run on ``device`` (default: cuda if there is one, else cpu), best first."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return [name for name, reason in reasons(torch.device(device).type, dtype).items() if reason is None]
