"""Who is timed: the eager chain, torch.compile of it, timm's layer, and normfused's backends; each optional one says why it is absent.

A provider makes a module with ``forward(x, residual)`` from a case. `oracle` is the chain in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import normfused as nf
from normfused.activations import TLU, module_of

from .cases import CHANNELS_LAST, Case


class FRN(nn.Module):
    """Filter response norm as papers list it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        square = x.pow(2).mean((2, 3), keepdim=True)
        return x * torch.rsqrt(square + 1e-6) * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class PlainTLU(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.max(x, self.tau.view(1, -1, 1, 1))


class OverChannels(nn.Module):
    """Layer or RMS norm of (N, C, *) maps, as ConvNeXt does it: permute, norm, permute."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return y


class Chain(nn.Module):
    """norm, add, activation: what is replaced."""

    def __init__(self, norm: nn.Module, act: nn.Module | None, residual: str | None) -> None:
        super().__init__()
        self.norm, self.act, self.mode = norm, act, residual

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if self.mode == "pre_norm":
            assert residual is not None
            x = x + residual
        z = self.norm(x)
        if self.mode == "pre_act":
            z = z + residual
        y = z if self.act is None else self.act(z)
        return (y, x) if self.mode == "pre_norm" else y


def _torch_norm(case: Case) -> nn.Module:
    channels, d = (case.shape[1] if case.dim == 1 or case.norm not in ("layer", "rms") else case.shape[-1]), len(case.shape) - 2
    if case.norm == "batch":
        return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[d](channels)
    if case.norm == "instance":
        return (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[d - 1](channels, affine=True)
    if case.norm == "group":
        return nn.GroupNorm(case.groups, channels)
    if case.norm == "frn":
        return FRN(channels)
    norm = nn.LayerNorm(channels) if case.norm == "layer" else nn.RMSNorm(channels)
    return OverChannels(norm) if case.dim == 1 else norm


def eager(case: Case) -> nn.Module:
    act = PlainTLU(case.shape[1]) if case.act == "tlu" else module_of(case.act, case.shape[1])
    if isinstance(act, nn.ReLU | nn.LeakyReLU):
        act.inplace = True  # as networks have it after a norm; it is the faster chain and keeps one tensor less
    return Chain(_torch_norm(case), act, case.residual)


def compiled(case: Case) -> nn.Module:
    # dynamic=True would cost the baseline its persistent kernels
    torch._dynamo.reset()
    return torch.compile(eager(case), dynamic=False)  # type: ignore[return-value]


def timm_layer(case: Case) -> nn.Module:
    from timm.layers import BatchNormAct2d, GroupNormAct  # type: ignore[import-not-found]

    act = type(module_of(case.act, 1) or nn.Identity())
    if case.norm == "batch":
        return Chain(BatchNormAct2d(case.shape[1], act_layer=act), None, None)
    return Chain(GroupNormAct(case.shape[1], num_groups=case.groups, act_layer=act), None, None)


def ours(backend: str) -> Callable[[Case], nn.Module]:
    def make(case: Case) -> nn.Module:
        channels, d = case.shape[1], len(case.shape) - 2
        options = {"act": case.act, "residual_mode": case.residual or "pre_act", "backend": backend}
        if case.norm == "batch":
            return (nf.BatchNormAct1d, nf.BatchNormAct1d, nf.BatchNormAct2d, nf.BatchNormAct3d)[d](channels, **options)
        if case.norm == "instance":
            return (nf.InstanceNormAct1d, nf.InstanceNormAct2d, nf.InstanceNormAct3d)[d - 1](channels, affine=True, **options)
        if case.norm == "group":
            return nf.GroupNormAct(case.groups, channels, **options)
        if case.norm == "frn":
            plain = options | {"act": None} if case.act == "tlu" else options
            return nf.FilterResponseNorm2d(channels, **plain)
        layer = nf.LayerNormAct if case.norm == "layer" else nf.RMSNormAct
        return layer(channels if case.dim == 1 else case.shape[-1], dim=case.dim, **options)

    return make


@dataclass(frozen=True)
class Provider:
    name: str
    make: Callable[[Case], nn.Module]
    absent: str | None = None

    def refuses(self, case: Case, device: str = "cpu") -> str | None:
        """Why it cannot run a case, or None."""
        if self.name == "timm" and (case.norm not in ("batch", "group") or case.residual or len(case.shape) != 4 or case.act == "identity"):
            return "timm has no layer for this"
        return None


def names() -> list[str]:
    return ["eager", "compile", "timm", "normfused-cuda", "normfused-triton", "normfused-torch"]


def all_providers(device: str, wanted: Sequence[str] | None = None) -> list[Provider]:
    def timm_absent() -> str | None:
        try:
            import timm  # noqa: F401
        except Exception as error:  # an import that fails for whatever reason is a peer that is absent
            return f"timm: {type(error).__name__}: {error}"
        return None

    found = [Provider("eager", eager), Provider("compile", compiled), Provider("timm", timm_layer, timm_absent())]
    for backend in ("cuda", "triton", "torch"):
        reason = nf.dispatch.unavailable(backend, device, torch.float32)
        if backend == "triton" and reason is None and device == "cpu":
            reason = "interpreted Triton is not timed"
        found.append(Provider(f"normfused-{backend}", ours(backend), reason))
    return [p for p in found if wanted is None or p.name in wanted]


def tensors(case: Case, device: str, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x, residual, dy), random, in the case's type and layout."""
    generator = torch.Generator(device).manual_seed(seed)

    def one() -> Tensor:
        t = torch.randn(case.shape, generator=generator, device=device).to(case.dtype)
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if case.layout == CHANNELS_LAST else t

    return one(), (one() if case.residual else None), one()


def prepare(provider: Provider, case: Case, device: str, training: bool = True) -> nn.Module:
    """The provider's module with the parameters that all providers of a case share (by position), in float32 or wider."""
    module = provider.make(case).to(device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
    return module.train(training)


def step(module: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y, gradients of x, residual and parameters)."""
    out = module(x) if residual is None else module(x, residual)
    y = out[0] if isinstance(out, tuple) else out
    wanted = [t for t in (x, residual, *module.parameters()) if t is not None]
    return y, torch.autograd.grad(y, wanted, dy)


def error_against_float64(provider: Provider, case: Case, device: str) -> float:
    """Largest error of y and of every gradient, as a multiple of what one case in its type allows; above 1 the provider is wrong."""
    x, residual, dy = tensors(case, device)
    oracle = copy.deepcopy(prepare(Provider("oracle", eager), case, device)).double()
    dy = dy.masked_fill(_near_a_kink(oracle, case, x, residual), 0)

    def run(module: nn.Module, kind: torch.dtype) -> list[Tensor]:
        leaves = [None if t is None else t.detach().to(kind).requires_grad_() for t in (x, residual)]
        assert leaves[0] is not None
        y, gradients = step(module, leaves[0], leaves[1], dy.to(kind))
        return [y.detach(), *gradients]

    wanted = run(oracle, torch.float64)
    # chains round once more at every link in half types; ATen's float32 kernels are allowed 1e-4
    allowed = {torch.float32: 1e-4, torch.float64: 1e-12}.get(case.dtype, 4 * torch.finfo(case.dtype).eps)
    got = run(prepare(provider, case, device), case.dtype)
    return max(float((g.double() - w).abs().max() / w.abs().max()) for g, w in zip(got, wanted, strict=True)) / allowed


def _near_a_kink(oracle: nn.Module, case: Case, x: Tensor, residual: Tensor | None) -> Tensor:
    """Where rounding decides on which side of the activation's kink z lies, and so whether a gradient passes at all."""
    if case.act not in ("relu", "leaky_relu", "tlu"):
        return torch.zeros((), dtype=torch.bool, device=x.device)
    act, oracle.act = oracle.act, None
    with torch.no_grad():
        z = oracle(x.double()) if residual is None else oracle(x.double(), residual.double())
    oracle.act = act
    kink = act.tau.detach().view(1, -1, *[1] * (x.dim() - 2)) if case.act == "tlu" else 0.0
    # eight roundings of the largest value
    return (z - kink).abs() < 8 * torch.finfo(case.dtype).eps * z.abs().max()


def saved_bytes(module: nn.Module, x: Tensor, residual: Tensor | None) -> int:
    """Bytes autograd keeps from the forward to the backward beside parameters; x, residual and y count."""
    parameters = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(x) if residual is None else module(x, residual)
    del out
    return sum(size for pointer, size in held.items() if pointer not in parameters)


__all__ = ["TLU", "Provider", "all_providers", "error_against_float64", "prepare", "saved_bytes", "step", "tensors"]
