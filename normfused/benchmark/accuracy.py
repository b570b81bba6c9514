"""Whether a provider is right: its outputs, gradients and running statistics against the eager chain in float64.

The numbers are chosen so that the usual mistakes show: every fourth unit that is normalized by itself (channel, sample, row) has a
standard deviation of 2^-9, where eps = 1e-5 more than doubles the variance; all have a mean of up to two standard deviations; dy shrinks
with x, so that every unit's gradient is of the same size. x + residual, where it is an output, gets a gradient of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Case
from .providers import Provider, eager, prepare, running_statistics, tensors

SMALL_STD = 2.0**-9
_CHUNK = 2**26
# Where an activation's derivative jumps
_KINKS = {
    "relu": (0.0,),
    "leaky_relu": (0.0,),
    "prelu": (0.0,),
    "relu6": (0.0, 6.0),
    "hardsigmoid": (-3.0, 3.0),
    "hardswish": (-3.0, 3.0),
}


@dataclass(frozen=True)
class Errors:
    """``max_err``: largest |got - float64| over the largest |float64| of the worst tensor; ``of_allowed``: the same in units of
    `allowed`, above 1 (or NaN anywhere: inf) is wrong; ``worst``: that tensor, e.g. "dx"."""

    max_err: float
    of_allowed: float
    worst: str

    @property
    def wrong(self) -> bool:
        return not self.of_allowed <= 1


def allowed(case: Case, name: str) -> float:
    r"""Error that roundings explain, relative to the largest value of the tensor ``name``.

    A chain rounds to its type after the norm, the add and the activation, each time by at most u = eps/2 of the value; the activation's
    and the norm's slopes, at most about 1.2 after the division by the largest value, and one rounding of the parameter or of a saved
    statistic carry these on: at most 3 (1.2 u) + u < 5 u forward, and as many again backward, where z is computed from rounded numbers.
    Together 8 u = 4 eps for half types. float32 and float64 are bounded by their sums instead: with M terms of random sign a sum loses
    sqrt(log2 M) u against terms whose sum is only sqrt(M) terms large, some 1e-6 in float32 for pairwise sums up to M = 2^27, and ten
    times that for ATen's serial ones; 1e-4 leaves room for both and for exponentials of 2 ulp, 1e-12 is as far from float64's.
    Running statistics are kept in float32 and come from x itself, whatever its type: always float32's bound.
    """
    dtype = torch.promote_types(case.dtype, torch.float32) if name.startswith("running") else case.dtype
    return {torch.float32: 1e-4, torch.float64: 1e-12}.get(dtype, 4 * torch.finfo(dtype).eps)


def telling_tensors(case: Case, device: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(x, residual, dy, dh) as the module's docstring says, in the case's type and layout; dh is the gradient of x + residual."""
    x, residual, dy = tensors(case, device)
    scale, mean = _scales(case, device)
    x = ((x + mean) * scale).to(case.dtype)
    if case.norm in ("batch_instance", "switchable"):  # else their norms give the same, and the mixture's gradient is what rounding left
        x[1::2] *= 2
    dh = dy.flip(0) * scale if case.shape[0] > 1 else dy.flip(-1) * scale
    if case.residual == "pre_norm" and residual is not None:
        residual = residual * scale
    return x, residual, dy * scale, dh


def _scales(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean over it of every unit, broadcasting to x, in x's type (both are exact in it)."""
    # one index of this dimension lies within one unit; for group norm runs of channels do
    dim = 0 if case.rows else 2 if case.dim == 1 and len(case.shape) > 2 else 1
    size = case.shape[dim]
    unit = torch.arange(size, device=device)
    if case.norm == "group":
        unit = unit // (size // case.groups)
    small = (unit.max() - unit) % 4 == 0  # from the last, so that a single unit is small
    shape = [1] * len(case.shape)
    shape[dim] = size
    scale = torch.where(small, SMALL_STD, 1.0).to(case.dtype).view(shape)
    return scale, (unit % 5 - 2).to(case.dtype).view(shape)


class Oracle:
    """What is right in one case and mode: made once, compared with every provider.

    One eager forward and backward in float64. What is kept is float32 for half types, whose errors are 1e4 times larger, so that a case of
    537 M elements keeps some 9 GB on the device and takes some 30 GB while it is made.
    """

    def __init__(self, case: Case, device: str, training: bool = True) -> None:
        self.case, self.device, self.training = case, device, training
        module = copy.deepcopy(prepare(Provider("oracle", eager), case, device, training)).double()
        self.x, self.residual, dy, self.dh = telling_tensors(case, device)
        self.dy = dy.masked_fill_(_near_a_kink(module, case, self.x, self.residual), 0)
        kept = torch.float32 if case.dtype.itemsize == 2 else torch.float64
        self.wanted = {name: t.to(kept) for name, t in _results(module, self, torch.float64)}

    def compare(self, provider: Provider) -> Errors:
        """The provider's errors in this case; whatever its module raises is raised."""
        worst = Errors(0.0, 0.0, "y")
        module = prepare(provider, self.case, self.device, self.training)
        found = dict(_results(module, self, self.case.dtype))
        for name, wanted in self.wanted.items():
            error = _relative_error(found.pop(name, None), wanted)
            share = error / allowed(self.case, name)
            if not share <= worst.of_allowed:
                worst = Errors(error, share, name)
        return worst


def errors(provider: Provider, case: Case, device: str, training: bool = True, oracle: Oracle | None = None) -> Errors:
    """Errors of ``provider`` in ``case``: y, x + residual, every gradient, and running statistics after a training forward.

    Args:
        oracle: of the same case, device and mode, if several providers are compared; made here by default.
    """
    oracle = oracle or Oracle(case, device, training)
    if (oracle.case, oracle.device, oracle.training) != (case, device, training):
        raise ValueError(f"errors: oracle must be of {case.name}, {device}, training={training}, got {oracle.case.name}, {oracle.device}")
    return oracle.compare(provider)


def error_against_float64(provider: Provider, case: Case, device: str) -> float:
    """`errors` in training mode, in units of what is allowed; above 1 the provider is wrong."""
    return errors(provider, case, device).of_allowed


def _results(module: nn.Module, oracle: Oracle, kind: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    # copies: a provider may write over what it is given
    leaves = [t.detach().to(kind, copy=True).requires_grad_() for t in (oracle.x, oracle.residual) if t is not None]
    out = module(*leaves)
    heads = out if isinstance(out, tuple) else (out,)
    inputs = [*leaves, *module.parameters()]
    # copies: a backward may write over its gradient
    ahead = [(head, g.to(kind, copy=True)) for head, g in zip(heads, (oracle.dy, oracle.dh), strict=False) if head.requires_grad]
    gradients = torch.autograd.grad([head for head, _ in ahead], inputs, [g for _, g in ahead], allow_unused=True)
    names = ["dx", "dresidual"][: len(leaves)] + [f"gradient of parameter {i}" for i in range(len(inputs) - len(leaves))]
    yield from zip(("y", "x + residual"), (h.detach() for h in heads), strict=False)
    yield from ((name, g) for name, g in zip(names, gradients, strict=True) if g is not None)
    if oracle.training:
        yield from zip(("running mean", "running variance"), running_statistics(module), strict=False)


def _relative_error(got: Tensor | None, wanted: Tensor) -> float:
    """inf for what is missing, of another shape, or not finite."""
    if got is None or got.shape != wanted.shape:
        return float("inf")
    dim = max(range(wanted.dim()), key=lambda d: wanted.shape[d])
    length = max(1, _CHUNK * wanted.shape[dim] // wanted.numel())  # float64 copies of all at once would be what takes the memory
    difference = largest = 0.0
    for g, w in zip(got.split(length, dim), wanted.split(length, dim), strict=True):
        chunk = float((g.double() - w.double()).abs().max())
        if chunk != chunk:
            return float("inf")
        difference, largest = max(difference, chunk), max(largest, float(w.abs().max()))
    return difference / largest if largest else difference


def _near_a_kink(oracle: nn.Module, case: Case, x: Tensor, residual: Tensor | None) -> Tensor:
    """Where rounding decides on which side of the activation's kink z lies, and so which gradient passes."""
    near = torch.zeros((), dtype=torch.bool, device=x.device)
    kinks: tuple[float | Tensor, ...] = _KINKS.get(case.act, ())
    linear: Any = copy.deepcopy(oracle)  # its own: a forward moves the running statistics
    if case.act == "tlu":
        kinks = (linear.act.tau.detach().view(1, -1, *[1] * (x.dim() - 2)),)
    if not kinks:
        return near
    linear.act = None
    with torch.no_grad():
        out = linear(x.double()) if residual is None else linear(x.double(), residual.double())
    z: Tensor = out[0] if isinstance(out, tuple) else out
    margin = allowed(case, "y") * z.abs().max()
    for kink in kinks:
        near = near | ((z - kink).abs() < margin)
    return near
