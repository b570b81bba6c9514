"""Finds and loads the compiled kernels, and keeps in one sentence why they cannot be used. Nothing here raises at import.

The operator library (``_ops.so``) is looked for in the package, then in the user's cache; with ``NORMFUSED_EMULATE=1`` it is the
emulation's, which runs the same kernels on CPU tensors (tests). Its operators are registered by loading it; csrc/binding/ops.cpp has
their schemas.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ... import _build
from ...activations import ACTIVATIONS
from ...problem import (
    BATCH_INSTANCE,
    CHANNEL,
    MEAN_ONLY,
    NHWC,
    POSITION,
    POST_ACT,
    PRE_ACT,
    PRE_NORM,
    RENORM,
    RMS,
    SAMPLE_GROUP,
    STANDARD,
    Problem,
)

__all__ = ["NEED_DRESIDUAL", "NEED_DX", "NEED_PARAMETERS", "Library", "library", "pack_code", "pack_needs", "reason", "record"]

# csrc/binding/code.h
_SCOPES = {CHANNEL: 0, SAMPLE_GROUP: 1, POSITION: 2}
_RESIDUAL_MODES = {None: 0, PRE_ACT: 1 << 6, POST_ACT: 2 << 6, PRE_NORM: 3 << 6}
_ACTS = {name: place << 8 for place, name in enumerate(ACTIVATIONS)}
_RULES = {rule: place << 14 for place, rule in enumerate((STANDARD, RMS, MEAN_ONLY, RENORM, BATCH_INSTANCE))}
_LAYOUT, _BATCH_STATISTICS, _CUMULATIVE = 1 << 2, 1 << 3, 1 << 4
NEED_DX, NEED_DRESIDUAL, NEED_PARAMETERS = 1, 2, 4


def pack_code(p: Problem) -> int:
    """The static part of a call that the operators take as ``code``."""
    code = _SCOPES[p.scope] | _RESIDUAL_MODES[p.residual_mode] | _ACTS[p.act.name] | _RULES[p.rule]
    if p.layout == NHWC:
        code |= _LAYOUT
    if p.batch_statistics:
        code |= _BATCH_STATISTICS
    if p.momentum is None:
        code |= _CUMULATIVE
    return code


def pack_needs(dx: bool, dresidual: bool, parameters: bool) -> int:
    """What a backward must compute, as the operators take it."""
    return dx * NEED_DX | dresidual * NEED_DRESIDUAL | parameters * NEED_PARAMETERS


@dataclass(frozen=True)
class Library:
    """A loaded operator library.

    Attributes:
        path: the file.
        ops: its operators, ``torch.ops.normfused_cuda`` or ``torch.ops.normfused_emulation``.
        emulated: whether it runs on CPU tensors.
        record: what was built from what.
        module: ``normfused._C``, None where it was not built for this Python.
    """

    path: Path
    ops: Any
    emulated: bool
    record: dict[str, Any]
    module: ModuleType | None

    @functools.cached_property
    def interface(self) -> Any:
        """Versions, limits and plans of the library (csrc/binding/module.cpp), None without the module."""
        return None if self.module is None else self.module.Library(str(self.path))

    def describe(
        self, p: Problem, step: str = "norm_act", needs: int = 7, limits: dict[str, int] | None = None, pool: bool = True
    ) -> dict[str, Any] | None:
        """The plan of a step, by default on the device of the problem (or an H200 where there is none); None without the module."""
        if self.module is None:
            return None
        if limits is None:
            index = p.device.index or 0
            limits = self.interface.limits(index) if self.emulated or p.device.type == "cuda" else {}
        dtype = str(p.dtype).removeprefix("torch.")
        question = self.module.Question(
            step, pack_code(p), dtype, (p.N, p.C, p.S), p.groups, p.eps, p.momentum or 0.0, p.act.p0, p.act.p1, needs, limits, pool
        )
        plan: dict[str, Any] = json.loads(self.interface.describe(question))
        scratch_bytes, arrivals = self.interface.requirements(question)
        return {**plan, "scratch_bytes": scratch_bytes, "arrivals": arrivals}


@dataclass(frozen=True)
class _State:
    library: Library | None
    reason: str | None
    record: dict[str, Any]


def library() -> Library | None:
    """The kernels, None if there are none or they do not load. That they are there does not mean that this GPU runs them: `reason`."""
    return _state().library


def reason() -> str | None:
    """None if the kernels can run here, else one sentence with the command that helps."""
    return _state().reason


def record() -> dict[str, Any]:
    """The build record of what is, or would be, loaded: kind, architectures, versions; of a pure Python install the reason."""
    return _state().record


def _emulating() -> bool:
    return os.environ.get("NORMFUSED_EMULATE") == "1"


@functools.cache
def _state() -> _State:
    if _build._numbers(torch.__version__) < _build.OLDEST_TORCH:
        return _State(None, f"the CUDA kernels need torch >= 2.10, this is {torch.__version__}; upgrade torch", {})
    return _emulation() if _emulating() else _extension()


_spare = 0


def set_spare_processors(count: int) -> None:
    """Multiprocessors that launches of blocks which wait for each other leave to kernels that run beside them, such as collectives.

    A set of elements too large for a cluster of blocks is normalized by blocks that must all be on the device at one time. Where a
    communication library keeps some multiprocessors busy, such a launch would wait for it; with as many to spare it does not.
    Other launches are not affected, nor is the Triton backend.

    Args:
        count: of each device, 0 (the default) or more; at least one is used whatever the count.

    Raises:
        TypeError: not an integer. ValueError: negative.
    """
    global _spare
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"set_spare_processors: count must be an int, got {type(count).__name__}")
    if count < 0:
        raise ValueError(f"set_spare_processors: count must not be negative, got {count}")
    _spare = count
    loaded = library()
    if loaded is not None:
        loaded.ops.set_spare_processors(count)


# ---------------------------------------------------------------------------------------------------------- emulation
def _emulation() -> _State:
    folder = _build.emulation_products()
    if folder is None:
        return _State(None, "NORMFUSED_EMULATE=1 needs a source checkout of normfused, this is an installed package", {})
    found = _build.read_record(folder)
    if not (folder / "_ops.so").exists():
        return _State(None, "NORMFUSED_EMULATE=1 and the emulation is not built; run: make emulation", found)
    if found.get("sources") != _build.sources_hash(emulation=True):
        return _State(None, "the emulation was built from other sources than these; run: make emulation", found)
    return _load(folder, found, emulated=True)


# ---------------------------------------------------------------------------------------------------------- extension
def _extension() -> _State:
    folders = list(_folders())
    records = [_build.read_record(folder) for folder in folders]
    capabilities = _capabilities()
    built = [(f, r) for f, r in zip(folders, records, strict=True) if (f / "_ops.so").exists()]
    if not built:
        return _State(None, _why_none(records[0]), records[0])
    # The one that serves the GPU, else the first, for its reason
    folder, found = min(built, key=lambda b: _mismatch(b[1], capabilities) is not None)
    stale = _stale(found)
    if stale is not None:
        return _State(None, stale, found)
    state = _load(folder, found, emulated=False)
    if state.library is None:
        return state
    return _State(state.library, _mismatch(found, capabilities), found)


def _folders() -> Iterator[Path]:
    yield _build.package_products()
    if _build.sources_folder().is_dir():
        yield from sorted(_build.cache_folder().glob(f"{_build.cached_prefix()}-*"))


def _capabilities() -> list[tuple[int, int]]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def _why_none(found: dict[str, Any]) -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if found.get("kind") != "python":
        return f"the CUDA extension is not built; run: {_build.COMMAND}"
    fix = found.get("fix") or f"run: {_build.COMMAND}"
    return f"this is a pure Python install ({found.get('reason', 'no reason was kept')}); {fix}"


def _stale(found: dict[str, Any]) -> str | None:
    now = _build.sources_hash()
    if now and found.get("sources") != now:
        return f"the CUDA extension was built from other sources than these; run: {_build.COMMAND}"
    return None


def _mismatch(found: dict[str, Any], capabilities: list[tuple[int, int]]) -> str | None:
    """Why the GPUs that are visible cannot run what was compiled."""
    if not capabilities:
        return "no CUDA GPU is visible to torch"
    for capability in capabilities:
        dotted = f"{capability[0]}.{capability[1]}"
        if capability < _build.OLDEST_ARCHITECTURE:
            return f"the CUDA kernels need compute capability 8.0 or newer, this GPU has {dotted}; Triton or torch runs there"
        compiled = found.get("architectures", [])
        if not _build.runs_on(compiled, capability):
            return f"the CUDA extension was compiled for {' '.join(compiled)} and this GPU has {dotted}; run: {_build.COMMAND}"
    return None


# ------------------------------------------------------------------------------------------------------------ loading
def _load(folder: Path, found: dict[str, Any], emulated: bool) -> _State:
    path = folder / "_ops.so"
    namespace = "normfused_emulation" if emulated else "normfused_cuda"
    try:
        torch.ops.load_library(str(path))
        ops = getattr(torch.ops, namespace)
        _ = ops.norm_act
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        command = "make emulation" if emulated else _build.COMMAND
        return _State(None, f"the CUDA extension does not load ({text}); build it again: {command}", found)
    if _spare:
        ops.set_spare_processors(_spare)
    return _State(Library(path, ops, emulated, found, _module(folder)), None, found)


def _module(folder: Path) -> ModuleType | None:
    """The pybind11 module, which is made for one Python; the operators do without."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_C{suffix}"
        if not path.exists():
            continue
        try:
            spec = importlib.util.spec_from_file_location("normfused._C", path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except Exception:  # built by another compiler or libstdc++
            return None
        return module
    return None
