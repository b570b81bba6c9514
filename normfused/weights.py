"""Weight norm and spectral norm of many weights at once: which kernels run, and autograd. The layers' side is `parametrizations`.

As in `ops`, a call is *fused* (an autograd Function over a backend's kernels: one per device, type and backend, for all weights
together; ATen's weight norm is a node of its own for each) or *composite* (differentiable PyTorch, one weight after the other: under
functorch, forward-mode AD, torch.compile, on meta tensors and for the backend ``reference``). A backward of which a graph is built is
composite, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch
from .backends.reference import weights as formulas
from .backends.torch import weights as aten
from .backends.weights import View, view_of

__all__ = ["Spectral", "Weighted", "spectral_norm", "weight_norm", "weight_norm_of"]

# Elements of a row that a block of the device goes over by itself; longer ones, of whole weights (dim=None), are ATen's (unmeasured)
_LONGEST_ROW = 1 << 18
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)


class Weighted(NamedTuple):
    """w = g * v/|v|; ``dim`` as torch's, but not negative."""

    g: Tensor
    v: Tensor
    dim: int | None


class Spectral(NamedTuple):
    """w = weight/sigma; u and v are updated in place where there are iterations."""

    weight: Tensor
    u: Tensor
    v: Tensor
    dim: int
    iterations: int
    eps: float


def _see_through() -> bool:
    """Whether something must see through the computation: a compiler, a transform, forward-mode AD, a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _backend(weight: Tensor, *others: Tensor) -> str | None:
    """Who computes it where nothing sees through, None for the composite."""
    dtype, device = weight.dtype, weight.device
    kind = "cpu" if weight.is_cpu else device.type  # the name takes longer than the question
    if type(weight) not in _PLAIN or dtype not in _DTYPES or kind == "meta" or not weight.numel():
        return None
    for t in others:
        if type(t) not in _PLAIN or t.dtype != dtype or t.device != device:
            return None
    name = dispatch.choose(kind, dtype)
    return None if name == "reference" else name


def _without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Of products with vectors, which autocast would compute in half precision; some devices (meta) have none."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if kind != "meta" and torch.is_autocast_enabled(kind) else nullcontext()


def _steps(backend: str) -> Any:
    return import_module(f"{__package__}.backends.{backend}.weights")


def _like(gradient: Tensor | None, weight: Tensor) -> Tensor | None:
    """The gradient in the memory order of its weight."""
    if gradient is None or gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight).copy_(gradient)


class _WeightNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, views: Sequence[View], *tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(views)
        weights, saved = _steps(backend).weight_norm(views, tensors[:n], tensors[n:])
        ctx.save_for_backward(*tensors, *saved)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.views = backend, views
        return tuple(weights)

    @staticmethod
    def backward(ctx: Any, *dweights: Tensor | None) -> tuple[Any, ...]:
        views = ctx.views
        n = len(views)
        gs, vs, saved = ctx.saved_tensors[:n], ctx.saved_tensors[n : 2 * n], ctx.saved_tensors[2 * n :]
        needed = [ctx.needs_input_grad[2 + i] or ctx.needs_input_grad[2 + n + i] for i in range(n)]
        wanted = [dw if need else None for dw, need in zip(dweights, needed, strict=True)]
        if torch.is_grad_enabled():
            pairs = [
                (None, None) if dw is None else formulas.weight_norm_backward(dw, g, v, view.dim)
                for view, dw, g, v in zip(views, wanted, gs, vs, strict=True)
            ]
            return (None, None, *(dg for dg, _ in pairs), *(dv for _, dv in pairs))
        dgs, dvs = _steps(ctx.backend).weight_norm_backward(views, [*map(_like, wanted, vs)], gs, vs, saved)
        return (None, None, *dgs, *dvs)


class _SpectralNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, views: Sequence[View], us: Sequence[Tensor], vs: Sequence[Tensor], iterations: int, eps: float,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        with _without_autocast(weights[0]):
            normalised, saved = _steps(backend).spectral_norm(views, weights, us, vs, iterations, eps)
        ctx.save_for_backward(*weights, *saved)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.views = backend, views
        return tuple(normalised)

    @staticmethod
    def backward(ctx: Any, *dweights: Tensor | None) -> tuple[Any, ...]:
        views = ctx.views
        n = len(views)
        weights, saved = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        wanted = [dw if need else None for dw, need in zip(dweights, ctx.needs_input_grad[6:], strict=True)]
        with _without_autocast(weights[0]):
            if torch.is_grad_enabled():
                us, vs = saved[0].split([w.R for w in views]), saved[1].split([w.columns for w in views])
                found = [
                    None if dw is None else formulas.spectral_norm_backward(dw, weight, u, v, view.dim)
                    for view, dw, weight, u, v in zip(views, wanted, weights, us, vs, strict=True)
                ]
            else:
                found = _steps(ctx.backend).spectral_norm_backward(views, [*map(_like, wanted, weights)], weights, saved)
        return (None,) * 6 + tuple(found)


def _apply(function: Any, *arguments: Any) -> tuple[Tensor, ...]:
    made: tuple[Tensor, ...] = function.apply(*arguments)
    return made


def weight_norm_of(g: Tensor, v: Tensor, dim: int | None) -> Tensor:
    """`weight_norm` of one weight, by the shortest way where ATen has a kernel for it as it is."""
    if not _see_through() and dim == 0 and v.dim() > 1 and v.is_contiguous() and g.is_contiguous() and _backend(v, g) == "torch":
        return aten.weight_norm_by_operator(g, v, dim)
    return weight_norm([Weighted(g, v, dim)])[0]


def weight_norm(of: Sequence[Weighted]) -> list[Tensor]:
    """The normalised weights, as many launches for all as for one of each device and type; ATen's kernels take them one by one.

    A backward through any of those that are launched together runs when the gradients of all that take part are there.
    """
    made: list[Tensor | None] = []
    together: defaultdict[Any, list[tuple[int, View, Tensor, Tensor]]] = defaultdict(list)
    composite = _see_through()
    for i, (g, v, dim) in enumerate(of):
        backend = None if composite else _backend(v, g)
        if backend is not None and not g.is_contiguous():
            g = g.contiguous()
        view = None if backend is None else view_of(v, dim)
        if view is None and backend is not None:
            v = v.contiguous()
            view = view_of(v, dim)
        if view is None:
            made.append(formulas.weight_norm(g, v, dim))
            continue
        if view.columns > _LONGEST_ROW:
            backend = "torch"
        weight = aten.weight_norm_of_rows(view, g, v) if backend == "torch" else None
        made.append(weight)
        if weight is None:
            together[backend, v.device, v.dtype].append((i, view, g, v))
    for (backend, _, _), members in together.items():
        places, views, gs, vs = zip(*members, strict=True)
        for i, weight in zip(places, _apply(_WeightNorm, backend, views, *gs, *vs), strict=True):
            made[i] = weight
    return made  # type: ignore[return-value]


def spectral_norm(of: Sequence[Spectral]) -> list[Tensor]:
    """The normalised weights, as many launches for all as for one of each device, type, eps and number of iterations.

    A backward through any of them runs when the gradients of all that take part are there.
    """
    made: list[Tensor | None] = [None] * len(of)
    together: defaultdict[Any, list[tuple[int, View, Tensor, Tensor, Tensor]]] = defaultdict(list)
    composite = _see_through()
    for i, (weight, u, v, dim, iterations, eps) in enumerate(of):
        backend = None if composite else _backend(weight, u, v)
        view = None
        if backend is not None and u.is_contiguous() and v.is_contiguous():
            view = view_of(weight, dim, ordered=True)
            if view is None:
                weight = weight.contiguous()
                view = view_of(weight, dim, ordered=True)
        if view is None:
            with _without_autocast(weight):
                made[i] = formulas.spectral_norm(weight, u, v, iterations, eps, dim)
        else:
            together[backend, weight.device, weight.dtype, iterations, eps].append((i, view, weight, u, v))
    for (backend, _, _, iterations, eps), members in together.items():
        places, views, weights, us, vs = zip(*members, strict=True)
        for i, weight in zip(places, _apply(_SpectralNorm, backend, views, us, vs, iterations, eps, *weights), strict=True):
            made[i] = weight
    return made  # type: ignore[return-value]
