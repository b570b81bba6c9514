r"""Whitening: channels are decorrelated in groups, by Newton's iteration (IterNorm) or exactly (ZCA).

The scheme of the other norms with d x d blocks for scalars: moments -> (mean, covariance), rule -> a matrix W per group of channels,
apply -> W(x - mean); backward likewise. The products over x are GEMMs of ATen; affine map, activation and residual add are the
backend's `apply`. What is d x d is computed in float64: Newton's iteration loses an ill-conditioned covariance in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks, dispatch, ops
from ..activations import ActivationLike
from ..problem import CHANNEL, NHWC, PRE_ACT, STANDARD, accumulation_dtype, dense, layout_of
from .base import RESIDUAL_MODES, call, resolve_act
from .tracked import TrackedNormAct, need_counter, per_channel, positions, track

METHODS = ("newton", "zca")
_LARGEST_GROUP = 64


# --------------------------------------------------------------------------------------------------- the rule, d x d
def whitening_matrix(cov: Tensor, method: str = "newton", iterations: int = 5) -> Tensor:
    """W of every covariance (g, d, d): Newton's iteration for its inverse root, or the inverse root itself."""
    if method == "zca":
        root: Tensor = _InverseRoot.apply(cov)  # type: ignore[no-untyped-call]
        return root
    share = cov.diagonal(dim1=-2, dim2=-1).sum(-1).reciprocal().view(-1, 1, 1)
    scaled = cov * share
    p = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device).expand_as(cov)
    for _ in range(iterations):
        p = 1.5 * p - 0.5 * (p @ p @ p @ scaled)
    return p * share.sqrt()


def _symmetric(t: Tensor) -> Tensor:
    return (t + t.mT) / 2


class _InverseRoot(torch.autograd.Function):
    """A^(-1/2) of symmetric positive A; not through eigh's derivative, which is infinite where eigenvalues meet.

    With S = A^(1/2) and W = 1/S: dS solves S dS + dS S = dA, and dW = -W dS W.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(a)
        root: Tensor = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
        return root

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        w: Tensor = _InverseRoot.apply(a)  # type: ignore[no-untyped-call]
        found: Tensor = _Lyapunov.apply(_symmetric(a @ w), w @ _symmetric(upstream) @ w)  # type: ignore[no-untyped-call]
        return -found


class _Lyapunov(torch.autograd.Function):
    """Y of S Y + Y S = X for symmetric S > 0 and X."""

    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor, x: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(s)
        inner = vectors.mT @ x @ vectors / (values.unsqueeze(-1) + values.unsqueeze(-2))
        found: Tensor = vectors @ inner @ vectors.mT
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        s, x = ctx.saved_tensors
        z: Tensor = _Lyapunov.apply(s, _symmetric(upstream))  # type: ignore[no-untyped-call]
        y: Tensor = _Lyapunov.apply(s, x)  # type: ignore[no-untyped-call]
        return -_symmetric(y @ z + z @ y), z


# --------------------------------------------------------------------------------------------------- the passes over x
def _blocks(x: Tensor, d: int) -> Tensor:
    """x as (batches, groups, d, columns): its own memory, except for contiguous maps of fewer positions than d, which are copied."""
    n, c = x.shape[:2]
    s = positions(x)
    if x.dim() > 2 and layout_of(x) != NHWC and s >= d:
        return x.reshape(n, c // d, d, s)
    return x.movedim(1, -1).reshape(n * s, c // d, d).permute(1, 2, 0).unsqueeze(0)


def _like(blocks: Tensor, x: Tensor) -> Tensor:
    """The inverse of `_blocks`, in x's memory format."""
    n, c = x.shape[:2]
    if blocks.shape[0] == n and blocks.shape[3] == positions(x) and x.dim() > 2 and layout_of(x) != NHWC:
        return blocks.reshape(x.shape)
    out = blocks.squeeze(0).permute(2, 0, 1).reshape(n, *x.shape[2:], c).movedim(-1, 1)
    return dense(out, layout_of(x) if x.dim() > 2 else None)


def _project(x: Tensor, w: Tensor, mean: Tensor | float) -> Tensor:
    """W(x - mean) of every group, in x's memory format."""
    return _like(w @ (_blocks(x, w.shape[-1]) - mean), x)


class _Project(torch.autograd.Function):
    """The same, W and mean constants, with a gradient in x's memory format."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, mean: Tensor | float) -> Tensor:
        return _project(x, w, mean)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _ = inputs
        ctx.layout = layout_of(x)
        ctx.save_for_backward(w)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        dx: Tensor = _Project.apply(dense(dz, ctx.layout), w.mT, 0.0)  # type: ignore[no-untyped-call]
        return dx, None, None


def _covariance(centred: Tensor, eps: float) -> Tensor:
    """(g, d, d) in float64, with eps on the diagonal."""
    count = centred.shape[0] * centred.shape[3]
    cov = (centred @ centred.mT).sum(0).double() / count
    return cov + eps * torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)


def _whiten(x: Tensor, d: int, eps: float, method: str, iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z, mean (g, d, 1), W, covariance) in differentiable operations."""
    blocks = _blocks(x, d)
    mean = blocks.mean((0, 3)).unsqueeze(-1)
    centred = blocks - mean
    cov = _covariance(centred, eps)
    w = whitening_matrix(cov, method, iterations)
    return _like(w.to(x.dtype) @ centred, x), mean, w, cov


class _Whiten(torch.autograd.Function):
    """The same with x alone kept of its size, and a backward of three products."""

    @staticmethod
    def forward(x: Tensor, d: int, eps: float, method: str, iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _whiten(x, d, eps, method, iterations)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, *ctx.static = inputs
        _, mean, w, cov = output
        ctx.mark_non_differentiable(mean, w, cov)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, w, cov)

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        x, mean, w, cov = ctx.saved_tensors
        nothing = (None,) * 4
        if dz is None:
            return None, *nothing
        d, eps, method, iterations = ctx.static
        if torch.is_grad_enabled():
            own = x.view_as(x)
            z = _whiten(own, d, eps, method, iterations)[0]
            return torch.autograd.grad(z, own, dz, create_graph=True)[0], *nothing
        centred, upstream = _blocks(x, d) - mean, _blocks(dense(dz, layout_of(x)), d)
        with torch.enable_grad():
            leaf = cov.detach().requires_grad_()
            (dcov,) = torch.autograd.grad(whitening_matrix(leaf, method, iterations), leaf, (upstream @ centred.mT).sum(0).double())
        count = centred.shape[0] * centred.shape[3]
        w = w.to(x.dtype)
        dx = w.mT @ upstream
        dx -= w.mT @ upstream.mean((0, 3)).unsqueeze(-1)
        dx += ((dcov + dcov.mT) / count).to(x.dtype) @ centred
        return _like(dx, x), *nothing


# --------------------------------------------------------------------------------------------------- the norm
def _group_size(op: str, channels: int, wanted: int | None) -> int:
    if channels < 1:
        raise ValueError(f"{op}: there must be at least 1 channel to whiten, got {channels}")
    if wanted is None:
        return max(size for size in range(1, min(channels, _LARGEST_GROUP) + 1) if channels % size == 0)
    if wanted < 1 or channels % wanted:
        raise ValueError(f"{op}: num_channels of a group must divide the channels {channels}, got {wanted}")
    return wanted


def _known_method(op: str, method: str, iterations: int) -> None:
    if method not in METHODS:
        raise ValueError(f"{op}: method must be one of {', '.join(METHODS)}, got {method!r}")
    if iterations < 1:
        raise ValueError(f"{op}: iterations must be at least 1, got {iterations}")


def iter_norm_act(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_wm: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_channels: int | None = None,
    method: str = "newton",
    iterations: int = 5,
    act: ActivationLike = "identity",
    act_param: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mode: str = PRE_ACT,
    num_batches_tracked: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Whitening, affine map, activation and residual add.

    .. math:: y = \mathrm{act}(\gamma_c\, [W(x - \mu)]_c + \beta_c \; [+\, r]),\quad
              \Sigma = \tfrac1m \textstyle\sum (x - \mu)(x - \mu)^T + \epsilon I

    in every group of d channels, over the m = N*S samples and positions. With ``"newton"`` :math:`W = \sqrt{t}\, P_T`,
    :math:`P_{k+1} = (3 P_k - P_k^3\, t\Sigma)/2`, :math:`P_0 = I`, :math:`t = 1/\mathrm{tr}\,\Sigma`: partial whitening, on purpose; with
    ``"zca"`` :math:`W = \Sigma^{-1/2}`. In training the mean and W are the batch's, and the running ones follow; otherwise those are used.

    Args:
        x: (N, C, \*) in float16, bfloat16, float32 or float64, any memory format. With m <= d the covariance is singular up to eps.
        running_mean, running_wm: (C/d, d, 1) and (C/d, d, d) or None, x's type or float32; needed if not training.
        weight, bias: (C,), x's type or float32; None for 1 and 0.
        training: use and track the batch's statistics (default False).
        momentum: weight of the new value (default 0.1); None averages over all batches and needs ``num_batches_tracked``.
        eps: on the covariance's diagonal (default 1e-5), > 0 in training.
        num_channels: d; by default running_wm's, else the largest divisor of C up to 64.
        method: "newton" (default) or "zca". iterations: T of "newton" (default 5; more than 7 gain little).
        act, act_param, residual, residual_mode, num_batches_tracked, backend: as in `batch_norm_act`.

    Returns:
        Tensor like x, in x's memory format.

    Raises:
        ValueError: d does not divide C, unknown method; ValueError, ShapeError, DTypeError, DeviceError, RuntimeError as in
            `batch_norm_act`.

    Differentiable in x, residual, weight, bias, act_param, twice; deterministic. Half types are computed in float32 and rounded once;
    matrix products over x follow `torch.backends.cuda.matmul`, what is d x d is float64.

    Reference: Huang, Zhou, Zhu, Liu & Shao, *Iterative Normalization*, arXiv 1904.03441; "zca": *Decorrelated Batch Normalization*,
    arXiv 1804.08450.
    """
    op = "iter_norm_act"
    checks.floating(op, x)
    checks.min_dim(op, x, 2)
    checks.eps(op, eps, positive=training)
    _known_method(op, method, iterations)
    per_channel(op, x, weight=weight, bias=bias)
    channels = x.shape[1]
    if num_channels is None and running_wm is not None and running_wm.dim() == 3:
        num_channels = running_wm.shape[2]
    d = _group_size(op, channels, num_channels)
    checks.statistics(op, running_mean, running_wm, "running_wm", needed="" if training else "when training=False")
    for name, value, last in (("running_mean", running_mean, 1), ("running_wm", running_wm, d)):
        checks.statistic(op, name, value, x, (channels // d, d, last))
    if residual_mode not in RESIDUAL_MODES:
        raise ValueError(f"{op}: residual_mode must be one of {', '.join(RESIDUAL_MODES)}, got {residual_mode!r}")
    if residual is not None:
        checks.residual(op, residual, x)
    if training:
        checks.more_than_one_value(op, x)
        if running_mean is not None:
            need_counter(op, momentum, num_batches_tracked)
    fused, act_weight, composed = resolve_act(op, act, act_param, x, channels)
    dispatch.choose(x.device.type, x.dtype, backend)  # raises before anything is written
    wide = x.to(accumulation_dtype(x.dtype))
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if autocast else nullcontext():  # an exported program would hold the context
        if x.numel() == 0:
            z, mean, w = wide, None, None
        else:
            traced = ops.see_through() or torch.compiler.is_compiling() or type(x) is not Tensor
            wide = wide if traced else dense(wide)
            if training:
                z, mean, w, _ = (_whiten if traced else _Whiten.apply)(wide, d, eps, method, iterations)  # type: ignore[no-untyped-call]
            else:
                assert running_mean is not None and running_wm is not None
                mean, w = (t.to(wide.dtype, copy=True) for t in (running_mean, running_wm))
                z = (_project if traced else _Project.apply)(wide, w, mean)  # type: ignore[no-untyped-call]
    gamma, beta, shortcut, act_weight = (None if t is None else t.to(wide.dtype) for t in (weight, bias, residual, act_weight))
    y: Tensor = call(
        op,
        z,
        gamma,
        beta,
        CHANNEL,
        STANDARD,
        1,
        0.0,
        composed or fused,
        act_weight,
        shortcut,
        residual_mode,
        backend,
        batch_statistics=False,
    )
    if training:
        track(momentum, num_batches_tracked, (running_mean, mean), (running_wm, None if w is None else w.to(wide.dtype)))
    return y.to(x.dtype)


class _IterNorm(TrackedNormAct):
    _statistics: ClassVar[Mapping[str, float]] = {}  # these have other shapes than (C,)

    running_mean: Tensor
    running_wm: Tensor

    def __init__(
        self,
        num_features: int,
        num_channels: int | None = None,
        iterations: int = 5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        method: str = "newton",
        act: ActivationLike = None,
        residual_mode: str = PRE_ACT,
        backend: str | None = None,
    ) -> None:
        name = type(self).__name__
        _known_method(name, method, iterations)
        d = _group_size(name, num_features, num_channels)
        super().__init__(num_features, eps, momentum, affine, affine and bias, True, device, dtype, act, residual_mode, backend)
        self.num_channels = d
        self.iterations = iterations
        self.method = method
        self.register_buffer("running_mean", torch.empty(num_features // d, d, 1, device=device, dtype=dtype))
        self.register_buffer("running_wm", torch.empty(num_features // d, d, d, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Running mean 0, running whitening matrix I, counter 0."""
        super().reset_running_stats()
        self.running_mean.zero_()
        eye = torch.eye(self.num_channels, device=self.running_wm.device, dtype=self.running_wm.dtype)
        self.running_wm.copy_(eye.expand_as(self.running_wm))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input(input)
        return iter_norm_act(
            input, self.running_mean, self.running_wm, self.weight, self.bias, self.training, self.momentum, self.eps,
            method=self.method, iterations=self.iterations, num_batches_tracked=self.num_batches_tracked, **self._epilogue(residual),
        )  # type: ignore[arg-type]  # fmt: skip

    def _own_repr(self) -> str:
        how = f"iterations={self.iterations}" if self.method == "newton" else f"method={self.method}"
        return f", num_channels={self.num_channels}, {how}"


_DOC = r"""Whitening (IterNorm) over {shape} with a fused activation and residual add; see `iter_norm_act` for formula, types and errors.

    Args:
        num_features: C.
        num_channels: d of the groups that are whitened; default: the largest divisor of C up to 64.
        iterations: T, default 5. eps: default 1e-5. momentum: default 0.1. affine, bias: default True.
        device, dtype: of parameters and statistics.
        method: ``"newton"`` (default) or ``"zca"``, exact.
        act: None (default), a name, ``(name, parameters)``, a torch activation module, or any callable (composed, not fused).
        residual_mode: ``"pre_act"`` (default) or ``"post_act"``; where ``forward(input, residual)`` adds its second argument.
        backend: None (default: the selected one) or a backend's name, for this layer alone.

    State dict: weight 1, bias 0 (C,), running_mean 0 (C/d, d, 1), running_wm I (C/d, d, d), num_batches_tracked. The reference's weight
    and bias of shape (1, C, 1, 1) are taken too, without a counter.

    Reference: Huang et al., *Iterative Normalization*, arXiv 1904.03441.
    """


class IterNorm1d(_IterNorm):
    __doc__ = _DOC.format(shape="(N, C) or (N, C, L)")
    _dimensions = (2, 3)


class IterNorm2d(_IterNorm):
    __doc__ = _DOC.format(shape="(N, C, H, W)")
    _dimensions = (4,)


class IterNorm3d(_IterNorm):
    __doc__ = _DOC.format(shape="(N, C, D, H, W)")
    _dimensions = (5,)
