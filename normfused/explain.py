"""Why a call runs where it runs: `explain` traces one forward on copies and reports what it saw."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import compiling, dispatch, ops
from .activations import Composed, from_module
from .problem import Problem

_PATHS = {
    "fused": "the backend's kernels; saves x and the moments",
    "composite": "ATen's own kernels, differentiable",
    "slices": "moments -> the rule in PyTorch -> apply",
    "rebuilt": "the backend's kernels; saves y and a number a set, rebuilds x in the backward",
    "synchronized": "moments -> what the processes know together -> apply",
}


_COMPILED = {
    "opaque": "holds normfused's operators, the same kernels",
    "decompose": "holds ATen's operations, which the compiler fuses",
}


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; ``str()`` of it is the report. ``saved_bytes`` counts what autograd keeps beside parameters and x itself;
    ``compiled`` is what `torch.compile` would make of it (`set_compile_mode`); ``further``: how many operations came after the one that is
    described, where a module of several layers was given."""

    name: str
    backend: str
    path: str
    scope: str
    rule: str
    act: str
    residual_mode: str | None
    composed: str | None
    rejected: dict[str, str]
    saved_bytes: int
    input_bytes: int
    plan: tuple[str, ...] = ()
    near_zero: int | None = None
    compiled: str = "decompose"
    further: int = 0

    def __str__(self) -> str:
        saved = "in place of x, y included" if self.path == "rebuilt" else "beside x and parameters"
        lines = [
            f"{self.name}: backend {self.backend}, {self.path} ({_PATHS[self.path]})",
            f"  scope {self.scope}, rule {self.rule}, activation {self.act}"
            + (f", residual {self.residual_mode}" if self.residual_mode else ""),
            f"  saved for the backward {saved}: {self.saved_bytes:,} bytes (x: {self.input_bytes:,})",
        ]
        if self.further:
            lines.append(f"  the first of {1 + self.further} operations; the bytes are those of the whole call")
        if self.near_zero is not None:
            lines.append(
                f"  weights too near 0 to rebuild x: {self.near_zero:,} so far (channels, summed over the training forwards)"
                + ("; their gradients cannot be relied on" if self.near_zero else "")
            )
        lines += [f"  {line}" for line in self.plan]
        lines.append(f"  compiled: {self.compiled} ({_COMPILED[self.compiled]})")
        if self.composed:
            lines.append(f"  {self.composed} is not one of the fused activations: composed after the norm, an extra pass over memory")
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


def explain(layer_or_function: nn.Module | Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend and path a layer or function of this library takes for ``x``, why not the others, and what it saves.

    Args:
        layer_or_function: a layer, which is copied, so that its statistics do not move, or a function of `normfused.functional`.
        x: the input; further arguments are passed on.

    Returns:
        `Explanation`; print it.

    Raises:
        ValueError: nothing of this library ran. Whatever the call itself raises.
    """
    target, name = layer_or_function, getattr(layer_or_function, "__name__", type(layer_or_function).__name__)
    composed = None
    if isinstance(target, nn.Module):
        act = getattr(target, "act", None)
        if isinstance(act, nn.Module) and from_module(act) is None:
            composed = act.extra_repr() if isinstance(act, Composed) else type(act).__name__
        target = copy.deepcopy(target)
    leaf = x.detach().requires_grad_()
    known = {leaf.untyped_storage().data_ptr(), x.untyped_storage().data_ptr()}
    if isinstance(target, nn.Module):
        known |= {t.untyped_storage().data_ptr() for t in (*target.parameters(), *target.buffers())}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        pointer = t.untyped_storage().data_ptr()
        if pointer not in known:
            saved[pointer] = t.untyped_storage().nbytes()
        return t

    copied = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
    copied_by_name = {k: a.detach().clone() if isinstance(a, Tensor) else a for k, a in kwargs.items()}
    before, ops.trace = ops.trace, []
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            target(leaf, *copied, **copied_by_name)
        seen = ops.trace
    finally:
        ops.trace = before
    if not seen:
        raise ValueError(f"explain: {name} ran no operation of normfused")
    backend, path, scope, rule, activation, residual_mode, p = seen[0]
    named = dispatch.get_backend() != "auto" or getattr(target, "backend", None) not in (None, "auto") or "backend" in kwargs
    rejected = {
        other: reason
        or ("only when it is named" if other == "reference" else f"{backend} was named" if named else f"auto takes {backend} here")
        for other, reason in dispatch.reasons(x.device.type, x.dtype).items()
        if other != backend
    }
    return Explanation(
        name,
        backend,
        path,
        scope,
        rule,
        str(activation),
        residual_mode,
        composed,
        rejected,
        sum(saved.values()),
        x.numel() * x.element_size(),
        _plan(backend, p),
        int(layer_or_function.near_zero) if getattr(layer_or_function, "memory_efficient", False) else None,  # type: ignore[union-attr, arg-type]
        _compiled(backend, path, rule),
        len(seen) - 1,
    )


def _compiled(backend: str, path: str, rule: str) -> str:
    mode = compiling.mode_of(backend)
    if path in ("rebuilt", "synchronized"):  # what these keep or exchange is theirs to say in every mode
        return compiling.OPAQUE
    return compiling.DECOMPOSE if rule == "affine" else mode  # an affine map alone is pointwise: the compiler's own work


def _plan(backend: str, p: Problem | None) -> tuple[str, ...]:
    """How the CUDA kernels run a call, a line per direction; nothing where the pybind11 module is missing."""
    if backend != "cuda" or p is None:
        return ()
    from .backends.cuda import _load

    library = _load.library()
    lines = []
    for direction, step in (("forward", "norm_act"), ("backward", "norm_act_backward")):
        found = None if library is None else library.describe(p, step)
        if found is None:
            return ()
        owner = ""
        if found["owner"] == "cluster":
            owner = f" a set to a cluster of {found['chunks']} blocks,"
        elif found["owner"] == "group":
            owner = f" a set to {found['chunks']} blocks that run together, {found['groups']} sets at a time,"
        lines.append(
            f"{direction}: {found['route']},{owner} {found['blocks']:,} blocks of {found['threads']} threads,"
            f" {found['shared_bytes']:,} bytes of shared memory each, asks for x {found['reads_of_x']:g}x"
        )
    return tuple(lines)
