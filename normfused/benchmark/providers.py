"""Who is timed: the eager chain, torch.compile of it, normfused's backends, and the installed libraries of peers.py.

A provider makes a module with ``forward(x, residual)`` from a case; every module of a case has the same parameters in the same order,
and is given the same values by `prepare`. accuracy.py compares them with the eager chain in float64.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import normfused as nf
from normfused.activations import module_of

from .cases import CHANNELS_LAST, Case


def eps_of(case: Case) -> float:
    """1e-5, torch's default for most norms; 1e-6 for FRN, as in its paper."""
    return 1e-6 if case.norm == "frn" else 1e-5


def _per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.view(1, -1, *[1] * (x.dim() - 2))


class FRN(nn.Module):
    """Filter response norm as papers list it; the mean of squares in float32, as autocast has it (float16 would overflow in backward)."""

    def __init__(self, channels: int, eps: float = 1e-6, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        square = x.pow(2).mean(tuple(range(2, x.dim())), keepdim=True, dtype=wide)
        return x * torch.rsqrt(square + self.eps).to(x.dtype) * _per_channel(self.weight, x) + _per_channel(self.bias, x)


class PlainTLU(nn.Module):
    def __init__(self, channels: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.zeros(channels, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.max(x, _per_channel(self.tau, x))


class _Composite(nn.Module):
    """A norm that torch does not have, as it is composed; parameters and statistics beside half types are float32, as are its steps."""

    statistics: tuple[str, ...] = ("running_mean", "running_var")

    def __init__(self, channels: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.empty(channels, dtype=dtype)) for _ in range(2))
        for name in self.statistics:
            self.register_buffer(name, torch.ones(channels, dtype=dtype))
        self.eps = eps

    def running(self, x: Tensor) -> list[Tensor]:
        return [_per_channel(self._buffers[name], x) for name in self.statistics]  # type: ignore[arg-type]

    @torch.no_grad()
    def track(self, momentum: float, *values: Tensor) -> None:
        for name, value in zip(self.statistics, values, strict=True):
            self._buffers[name].lerp_(value.flatten(), momentum)  # type: ignore[union-attr]

    def affine(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return (x * _per_channel(self.weight, x) + _per_channel(self.bias, x)).to(dtype)


def _over(x: Tensor, dims: Collection[int]) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) in float32 or better."""
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), tuple(dims), correction=0, keepdim=True)
    return mean, var


def _batch(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


class BatchInstance(_Composite):
    """Batch-instance norm (Nam & Kim, arXiv 1805.07925)."""

    def __init__(self, channels: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__(channels, eps, dtype)
        self.gate = nn.Parameter(torch.empty(channels, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        running = self._buffers["running_mean"], self._buffers["running_var"]
        batch = nn.functional.batch_norm(x, *running, training=self.training, eps=self.eps)
        instance = nn.functional.instance_norm(x, eps=self.eps)
        gate = _per_channel(self.gate, x)
        return self.affine(gate * batch + (1 - gate) * instance, x.dtype)


class BatchRenorm(_Composite):
    """Batch Renorm (Ioffe, arXiv 1702.03275) with bounds 3 and 5."""

    statistics = ("running_mean", "running_std")

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.running(x)
        if not self.training:
            return self.affine((x - mean) / std, x.dtype)
        batch_mean, var = _over(x, _batch(x))
        batch_std = (var + self.eps).sqrt()
        r = (batch_std / std).clamp(1 / 3, 3).detach()
        d = ((batch_mean - mean) / std).clamp(-5, 5).detach()
        self.track(0.01, batch_mean, batch_std)
        return self.affine((x - batch_mean) / batch_std * r + d, x.dtype)


class Switchable(_Composite):
    """Switchable norm (Luo et al., arXiv 1806.10779) of three statistics."""

    def __init__(self, channels: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__(channels, eps, dtype)
        self.mean_weight, self.var_weight = (nn.Parameter(torch.empty(3, dtype=dtype)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = _over(x, range(2, x.dim()))
        pairs = [(mean, var)]
        for dim in (1, 0):
            centre = mean.mean(dim, keepdim=True)
            pairs.append((centre, var.mean(dim, keepdim=True) + (mean - centre).square().mean(dim, keepdim=True)))
        if self.training:
            self.track(0.1, *pairs[2])
        else:
            pairs[2] = tuple(self.running(x))  # type: ignore[assignment]
        shares, var_shares = self.mean_weight.softmax(0), self.var_weight.softmax(0)
        mean = shares[0] * pairs[0][0] + shares[1] * pairs[1][0] + shares[2] * pairs[2][0]
        var = var_shares[0] * pairs[0][1] + var_shares[1] * pairs[1][1] + var_shares[2] * pairs[2][1]
        return self.affine((x - mean) / (var + self.eps).sqrt(), x.dtype)


class MeanOnly(_Composite):
    """Mean-only batch norm (Salimans & Kingma, arXiv 1602.07868)."""

    statistics = ("running_mean",)

    def __init__(self, channels: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__(channels, eps, dtype)
        self.weight = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        (mean,) = self.running(x)
        if self.training:
            mean = x.mean(_batch(x), keepdim=True, dtype=mean.dtype)
            self.track(0.1, mean)
        return (x - mean + _per_channel(self.bias, x)).to(x.dtype)


class Evaluating(_Composite):
    """EvalNorm's evaluation (Singh & Shrivastava, arXiv 1904.06031), of a network trained with a batch of 32."""

    def forward(self, x: Tensor) -> Tensor:
        own, own_var = _over(x, range(2, x.dim()))
        mean, var = self.running(x)
        share, apart = 1 / 32, own - mean
        var = share * own_var + (1 - share) * var + share * (1 - share) * apart.square()
        return self.affine((x - mean - share * apart) / (var + self.eps).sqrt(), x.dtype)


class InEvaluation(nn.Module):
    """A layer that is timed in evaluation mode, whatever the others are in."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def train(self, mode: bool = True) -> InEvaluation:
        return super().train(False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return self.layer(x, residual)


class Whitening(_Composite):
    """IterNorm (Huang et al., arXiv 1904.03441) with five iterations, groups of up to 64 channels."""

    statistics = ()

    def __init__(self, channels: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__(channels, eps, dtype)
        self.size = min(channels, 64)
        self.register_buffer("running_mean", torch.zeros(channels // self.size, self.size, 1, dtype=dtype))
        self.register_buffer("running_wm", torch.eye(self.size, dtype=dtype).repeat(channels // self.size, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        moved = x.transpose(0, 1).contiguous()
        blocks = moved.view(-1, self.size, x.numel() // x.shape[1]).to(torch.promote_types(x.dtype, torch.float32))
        mean, w = self._buffers["running_mean"], self._buffers["running_wm"]
        assert mean is not None and w is not None
        eye = torch.eye(self.size, dtype=blocks.dtype, device=x.device)
        if self.training:
            batch_mean = blocks.mean(2, keepdim=True)
            centred = blocks - batch_mean
            cov = centred @ centred.mT / centred.shape[2] + self.eps * eye
            share = cov.diagonal(dim1=1, dim2=2).sum(1).reciprocal().view(-1, 1, 1)
            p = eye.expand_as(cov)
            for _ in range(5):
                p = 1.5 * p - 0.5 * torch.matrix_power(p, 3) @ (cov * share)
            batch_w = p * share.sqrt()
            with torch.no_grad():
                mean.lerp_(batch_mean.to(mean.dtype), 0.1)
                w.lerp_(batch_w.to(w.dtype), 0.1)
            mean, w = batch_mean, batch_w
        else:
            centred = blocks - mean
        return self.affine((w @ centred).view(moved.shape).transpose(0, 1), x.dtype)


_COMPOSED: dict[str, Callable[..., nn.Module]] = {
    "frn": FRN,
    "batch_instance": BatchInstance,
    "batch_renorm": BatchRenorm,
    "switchable": Switchable,
    "mean_only": MeanOnly,
    "eval": Evaluating,
    "whitening": Whitening,
}


class OverChannels(nn.Module):
    """Layer or RMS norm of (N, C, *) maps, as ConvNeXt does it: permute, norm, permute."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return y


class Chain(nn.Module):
    """norm, add, activation: what is replaced. With ``residual="pre_norm"`` returns (y, x + r)."""

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
    channels, d = case.channels, len(case.shape) - 2
    options: dict[str, Any] = {"eps": eps_of(case), "dtype": case.parameter_dtype}
    if case.norm == "batch":
        return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[d](channels, **options)
    if case.norm == "instance":
        return (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[d - 1](channels, affine=True, **options)
    if case.norm == "group":
        return nn.GroupNorm(case.groups, channels, **options)
    if case.norm in _COMPOSED:
        return _COMPOSED[case.norm](channels, **options)
    norm = nn.LayerNorm(channels, **options) if case.norm == "layer" else nn.RMSNorm(channels, **options)
    return OverChannels(norm) if case.dim == 1 else norm


def activation(case: Case) -> nn.Module | None:
    """The case's activation as a chain has it."""
    if case.act == "tlu":
        return PlainTLU(case.channels, case.parameter_dtype)
    act = module_of(case.act, case.channels, dtype=case.parameter_dtype)
    if isinstance(act, nn.ReLU | nn.LeakyReLU):
        act.inplace = True  # as networks have it after a norm; it is the faster chain and keeps one tensor less
    return act


def eager(case: Case) -> nn.Module:
    return Chain(_torch_norm(case), activation(case), case.residual)


class _WithoutCudnn(nn.Module):
    """Backward takes the kernels of its forward's choice by itself."""

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return self.chain(x, residual)


def _run(chain: nn.Module, x: Tensor, residual: Tensor | None) -> Any:
    return chain(x, residual)


class _Compiled(nn.Module):
    """A chain compiled by itself. dynamic=True would cost the baseline its persistent kernels.

    torch keeps compiled code by code object: each module calls through one of its own, so that no case slows the guards of another,
    comes under the limit of recompilations because of others, or has to be compiled again after a reset for others.
    """

    def __init__(self, chain: nn.Module, mode: str) -> None:
        super().__init__()
        self.chain = chain
        self._run = torch.compile(types.FunctionType(_run.__code__.replace(), _run.__globals__), mode=mode, dynamic=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return self._run(self.chain, x, residual)


def compiled(mode: str) -> Callable[[Case], nn.Module]:
    return lambda case: _Compiled(eager(case), mode)


def _of_dimensions(stem: str, d: int) -> Any:
    return getattr(nf, f"{stem}{max(d, 1)}d")


# (number of spatial dimensions, channels, options) -> layer
_LAYERS: dict[str, Callable[[int, int, dict[str, Any]], nn.Module]] = {
    "batch_instance": lambda d, c, o: _of_dimensions("BatchInstanceNormAct", d)(c, **o),
    "batch_renorm": lambda d, c, o: _of_dimensions("BatchRenormAct", d)(c, warmup_steps=0, r_max_step=0, d_max_step=0, **o),
    "switchable": lambda d, c, o: _of_dimensions("SwitchNormAct", d)(c, using=("in", "ln", "bn"), **o),
    "mean_only": lambda d, c, o: _of_dimensions("MeanOnlyBatchNormAct", d)(c, **{k: v for k, v in o.items() if k != "eps"}),
    "eval": lambda d, c, o: InEvaluation(_of_dimensions("EvalNorm", d)(c, batch_size=32, **o)),
    "whitening": lambda d, c, o: _of_dimensions("IterNorm", d)(c, min(c, 64), **o),
}


def ours(backend: str, **more: Any) -> Callable[[Case], nn.Module]:
    """The layer that takes the chain's place, on that backend; ``more`` are arguments of its constructor."""

    def make(case: Case) -> nn.Module:
        channels, d = case.channels, len(case.shape) - 2
        options: dict[str, Any] = {
            "eps": eps_of(case),
            "act": case.act,
            "residual_mode": case.residual or "pre_act",
            "backend": backend,
            "dtype": case.parameter_dtype,
            **more,
        }
        if case.norm == "batch":
            return (nf.BatchNormAct1d, nf.BatchNormAct1d, nf.BatchNormAct2d, nf.BatchNormAct3d)[d](channels, **options)
        if case.norm == "instance":
            return (nf.InstanceNormAct1d, nf.InstanceNormAct2d, nf.InstanceNormAct3d)[d - 1](channels, affine=True, **options)
        if case.norm == "group":
            return nf.GroupNormAct(case.groups, channels, **options)
        if case.norm in _LAYERS:
            return _LAYERS[case.norm](d, channels, options)
        if case.norm == "frn":
            plain = options | {"act": None} if case.act == "tlu" else options  # its default is TLU
            return (nf.FilterResponseNorm1d, nf.FilterResponseNorm2d, nf.FilterResponseNorm3d)[d - 1](channels, **plain)
        layer = nf.LayerNormAct if case.norm == "layer" else nf.RMSNormAct
        return layer(channels, dim=case.dim, **options)

    return make


def never(case: Case, device: str, training: bool) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """``make`` is called only where ``absent`` and `refuses` are None; both are sentences for the table."""

    name: str
    make: Callable[[Case], nn.Module]
    absent: str | None = None
    refusal: Callable[[Case, str, bool], str | None] = never

    def refuses(self, case: Case, device: str, training: bool = True) -> str | None:
        """Why it cannot run, or would not show anything of its own, in this case on "cpu" or "cuda"; or None."""
        return self.refusal(case, device, training)


def _no_autotuning(case: Case, device: str, training: bool) -> str | None:
    return "on a CPU it tunes only matrix products, of which a norm has none" if device == "cpu" else None


def _no_cudnn(case: Case, device: str, training: bool) -> str | None:
    if case.norm != "batch" or len(case.shape) < 3 or case.dtype not in (torch.float16, torch.float32):
        return "torch takes cuDNN only for batch norm of maps in float16 and float32"
    return None


def _normfused(backend: str, device: str) -> Provider:
    reason = nf.dispatch.unavailable(backend, device, torch.float32)
    if backend == "triton" and reason is None and device == "cpu":
        reason = "interpreted Triton is not timed"
    return Provider(f"normfused-{backend}", ours(backend), reason)


def _built_in(device: str) -> list[Provider]:
    no_cudnn = "torch has cuDNN on a GPU only" if device == "cpu" else None
    return [
        Provider("eager", eager),
        Provider("eager-no-cudnn", lambda case: _WithoutCudnn(eager(case)), no_cudnn, _no_cudnn),
        Provider("compile", compiled("default")),
        Provider("compile-max-autotune", compiled("max-autotune-no-cudagraphs"), None, _no_autotuning),
        *(_normfused(backend, device) for backend in ("cuda", "triton", "torch")),
    ]


def names() -> list[str]:
    """Of all providers, without importing any library."""
    from .peers import PEERS  # which is made of this module's chain

    return [*(provider.name for provider in _built_in("cpu")), *PEERS]


def all_providers(device: str, wanted: Collection[str] | None = None, peers: bool = False) -> list[Provider]:
    """The providers for ``device`` ("cpu" or "cuda"), absent ones with their reason.

    Args:
        device: "cpu" or "cuda".
        wanted: names of those to return, in the order of `names`; None (default): torch's and normfused's, and with ``peers`` the rest.
        peers: also every library of peers.py. Only the libraries that are returned are imported.

    Raises:
        ValueError: an unknown name.
    """
    from .peers import PEERS, probe

    unknown = sorted(set(wanted or ()) - set(names()))
    if unknown:
        raise ValueError(f"all_providers: wanted must be of {', '.join(names())}, got {', '.join(unknown)}")
    found = [provider for provider in _built_in(device) if wanted is None or provider.name in wanted]
    for name, peer in PEERS.items():
        if (peers and wanted is None) or (wanted is not None and name in wanted):
            found.append(Provider(name, peer.make, probe(peer, device), peer.refuses))
    return found


def tensors(case: Case, device: str, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x, residual, dy), random, in the case's type and layout."""
    generator = torch.Generator(device).manual_seed(seed)

    def one() -> Tensor:
        t = torch.randn(case.shape, generator=generator, device=device).to(case.dtype)
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if case.layout == CHANNELS_LAST else t

    return one(), (one() if case.residual else None), one()


def prepare(provider: Provider, case: Case, device: str, training: bool = True) -> nn.Module:
    """The provider's module with the values that all providers of a case share (by position): parameters, and running statistics.

    The values are exact in the case's type, whatever type a provider keeps its parameters in.
    """
    module = provider.make(case).to(device)
    generator = torch.Generator().manual_seed(1)

    def draw(t: Tensor) -> Tensor:
        return (torch.rand(t.shape, generator=generator) + 0.5).to(case.dtype)

    with torch.no_grad():
        for p in module.parameters():
            p.copy_(draw(p))
        for statistics in running_statistics(module):
            statistics.copy_(draw(statistics))
    return module.train(training)


def running_statistics(module: nn.Module) -> list[Tensor]:
    """The module's running mean and variance, or what it keeps in their place, if any."""
    buffers = {name.rpartition(".")[2]: t for name, t in module.named_buffers()}
    return [buffers[name] for name in ("running_mean", "running_var", "running_std", "running_wm") if name in buffers]


def step(module: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y, gradients of x, residual and parameters); a second output, x + residual, gets the gradient ``dy`` too."""
    out = module(x) if residual is None else module(x, residual)
    heads = out if isinstance(out, tuple) else (out,)
    wanted = [t for t in (x, residual, *module.parameters()) if t is not None]
    return heads[0], torch.autograd.grad(heads, wanted, (dy,) * len(heads))


def storages_kept(module: nn.Module, x: Tensor, residual: Tensor | None) -> tuple[dict[int, int], Any]:
    """What autograd keeps from the forward to the backward beside parameters and buffers: bytes by address; and the output."""
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(x) if residual is None else module(x, residual)
    for t in (*module.parameters(), *module.buffers()):
        held.pop(t.untyped_storage().data_ptr(), None)
    return held, out


def saved_bytes(module: nn.Module, x: Tensor, residual: Tensor | None) -> int:
    """Bytes autograd keeps from the forward to the backward beside parameters; x, residual and y count."""
    return sum(storages_kept(module, x, residual)[0].values())
