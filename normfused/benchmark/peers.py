"""Other people's kernels, each behind the same ``forward(x, residual)``: imported when it is asked for, absent with the reason otherwise.

A library that fuses less than the case asks for is followed by torch's add and activation, as its users would have it. It is refused
where it would only call torch, or cannot run. Nothing is installed here, and no library may replace torch's operators: of FlagGems only
its functions are called, never ``enable``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .cases import CHANNELS_LAST, Case
from .providers import Chain, activation, eps_of

Refusal = Callable[[Case, str, bool], "str | None"]


@dataclass(frozen=True)
class Peer:
    """A library: ``module`` is imported to see whether it is there, ``install`` says how it would come."""

    module: str
    install: str
    make: Callable[[Case], nn.Module]
    refuses: Refusal
    gpu_only: bool = True


def probe(peer: Peer, device: str) -> str | None:
    """Imports the library; None, or a sentence why it is not here. A failed import leaves none of the library's modules behind."""
    package = peer.module.partition(".")[0]
    try:
        if find_spec(package) is None:
            return f"{package} is not installed: {peer.install}"
    except (ImportError, ValueError) as error:
        return f"{package} cannot be looked for: {type(error).__name__}: {_first_line(error)}"
    if peer.gpu_only and device != "cuda":
        return f"{package} has kernels for a GPU only"
    before = set(sys.modules)
    try:
        importlib.import_module(peer.module)
    except (Exception, SystemExit) as error:  # whatever stops a peer must not stop the benchmark
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == package:
                del sys.modules[name]
        return f"{peer.module} cannot be imported: {type(error).__name__}: {_first_line(error)}"
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")[:160]


def _only(*norms: str) -> Refusal:
    """Refuses every other norm, and rows' norms over the channels of maps."""

    def refuses(case: Case, device: str, training: bool) -> str | None:
        if case.norm not in norms:
            return f"it has no {case.norm.replace('_', '-')} norm of its own"
        if case.norm in ("layer", "rms") and not case.rows:
            return "it normalizes the last dimension only"
        return None

    return refuses


def _all(*refusals: Refusal) -> Refusal:
    """The first reason of several."""

    def refuses(case: Case, device: str, training: bool) -> str | None:
        return next((reason for reason in (r(case, device, training) for r in refusals) if reason), None)

    return refuses


class _Affine(nn.Module):
    """Weight and perhaps bias of a norm that its library offers as a function."""

    def __init__(self, case: Case, dtype: torch.dtype | None = None, bias: bool = True) -> None:
        super().__init__()
        kind = dtype or case.parameter_dtype
        self.weight = nn.Parameter(torch.empty(case.channels, dtype=kind))
        self.bias = nn.Parameter(torch.empty(case.channels, dtype=kind)) if bias else None
        self.eps, self.case = eps_of(case), case


def _chain(norm: nn.Module, case: Case) -> nn.Module:
    return Chain(norm.to(case.parameter_dtype), activation(case), case.residual)


class _AddNorm(nn.Module):
    """norm(x + r) in one kernel, then the activation; returns (y, x + r)."""

    def __init__(self, norm: nn.Module, act: nn.Module | None) -> None:
        super().__init__()
        self.norm, self.act = norm, act

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, h = self.norm(x, residual)
        return (y if self.act is None else self.act(y)), h


# --- timm: layers that call torch's norm and activation


def _timm(case: Case) -> nn.Module:
    from timm import layers

    act = type(activation(case) or nn.Identity())
    if case.norm == "frn":
        return Chain(layers.FilterResponseNormTlu2d(case.channels, eps=eps_of(case), dtype=case.parameter_dtype), None, None)
    options: dict[str, Any] = {"eps": eps_of(case), "act_layer": act}
    if case.norm == "batch":
        norm = layers.BatchNormAct2d(case.channels, **options)
    else:
        norm = layers.GroupNormAct(case.channels, num_groups=case.groups, **options)
    return Chain(norm.to(case.parameter_dtype), None, None)


def _timm_lacks(case: Case, device: str, training: bool) -> str | None:
    plain = ("relu", "silu", "gelu", "hardswish", "mish", "elu", "leaky_relu")  # classes that need no argument to be the case's
    if case.residual or len(case.shape) != 4 or case.act not in (("tlu",) if case.norm == "frn" else plain):
        return "it has no layer that joins these steps"
    return None


# --- Liger-Kernel: Triton


def _liger(case: Case) -> nn.Module:
    from liger_kernel import transformers as liger

    eps = eps_of(case)
    if case.norm == "group":
        from liger_kernel.transformers.group_norm import LigerGroupNorm

        return _chain(LigerGroupNorm(case.channels, case.groups, eps=eps), case)
    if case.norm == "layer":
        return _chain(liger.LigerLayerNorm(case.channels, eps=eps), case)
    if case.residual == "pre_norm":
        norm = liger.LigerFusedAddRMSNorm(case.channels, eps=eps, in_place=False)
        return _AddNorm(norm.to(case.parameter_dtype), activation(case))
    # in_place=True would write dx over the gradient it is given
    return _chain(liger.LigerRMSNorm(case.channels, eps=eps, in_place=False), case)


# --- quack: CuTe DSL


class _QuackLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        from quack.rmsnorm import layernorm_fwd

        y, rstd, mean = layernorm_fwd(x, weight, bias, eps=eps, return_rstd=True, return_mean=True)
        ctx.save_for_backward(x, weight, rstd, mean)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from quack.rmsnorm import layernorm_bwd

        x, weight, rstd, mean = ctx.saved_tensors
        return (*layernorm_bwd(x, weight, dy.contiguous(), rstd, mean, has_bias=True), None)


class _Quack(_Affine):
    """Layer norm takes float32 parameters only; RMS norm any."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, torch.float32 if case.norm == "layer" else None, bias=case.norm == "layer")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        from quack.rmsnorm import rmsnorm

        if self.bias is None:
            return rmsnorm(x, self.weight, residual=residual, eps=self.eps, prenorm=residual is not None)
        return _QuackLayerNorm.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias, self.eps).reshape(x.shape)  # type: ignore[no-untyped-call]


def _quack(case: Case) -> nn.Module:
    if case.norm == "rms" and case.residual == "pre_norm":
        return _AddNorm(_Quack(case), activation(case))
    return Chain(_Quack(case), activation(case), case.residual)


# --- torchnorm: Triton; on a CPU it calls torch


def _torchnorm(case: Case) -> nn.Module:
    import torchnorm

    if case.norm == "layer":
        return _chain(torchnorm.LayerNorm(case.channels, eps=eps_of(case)), case)
    if case.residual == "pre_norm":
        norm = torchnorm.FusedAddRMSNorm(case.channels, eps=eps_of(case))
        return _AddNorm(norm.to(case.parameter_dtype), activation(case))
    return _chain(torchnorm.RMSNorm(case.channels, eps=eps_of(case)), case)


def _torchnorm_calls_torch(case: Case, device: str, training: bool) -> str | None:
    return "its group and instance norm call torch's" if case.norm in ("group", "instance") else None


# --- FlagGems: Triton, by its functions


class _GemsBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, momentum: float, eps: float) -> Tensor:
        from flag_gems.ops.batch_norm import batch_norm

        y, saved_mean, saved_rstd = batch_norm(x, weight, bias, mean, var, training=True, momentum=momentum, eps=eps)
        ctx.save_for_backward(x, weight, saved_mean, saved_rstd)
        ctx.eps = eps
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from flag_gems.ops.batch_norm import batch_norm_backward

        x, weight, mean, rstd = ctx.saved_tensors
        dx, dw, db = batch_norm_backward(dy, x, weight, None, None, mean, rstd, True, ctx.eps, (True, True, True))
        return dx, dw.to(weight.dtype), db.to(weight.dtype), None, None, None, None


class _GemsGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        from flag_gems.ops.groupnorm import group_norm

        ctx.sizes = x.shape[0], x.shape[1], x.numel() // (x.shape[0] * x.shape[1]), groups
        y, mean, rstd = group_norm(x, weight, bias, *ctx.sizes, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from flag_gems.ops.groupnorm import group_norm_backward

        x, weight, mean, rstd = ctx.saved_tensors
        return (*group_norm_backward(dy, x, mean, rstd, weight, *ctx.sizes, (True, True, True)), None, None)


class _GemsLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        from flag_gems.ops.layernorm import layer_norm

        y, mean, rstd = layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from flag_gems.ops.layernorm import layer_norm_backward

        x, weight, bias, mean, rstd = ctx.saved_tensors
        return (*layer_norm_backward(dy, x, weight.shape, mean, rstd, weight, bias, (True, True, True)), None)


class _Gems(_Affine):
    def __init__(self, case: Case) -> None:
        super().__init__(case, bias=case.norm != "rms")
        if case.norm == "batch":
            self.register_buffer("running_mean", torch.zeros(case.channels))
            self.register_buffer("running_var", torch.ones(case.channels))

    def forward(self, x: Tensor) -> Any:
        weight, bias, eps = self.weight, self.bias, self.eps
        if self.case.norm == "batch":
            return _GemsBatchNorm.apply(x, weight, bias, self.running_mean, self.running_var, 0.1, eps)  # type: ignore[no-untyped-call]
        if self.case.norm == "group":
            return _GemsGroupNorm.apply(x, weight, bias, self.case.groups, eps)  # type: ignore[no-untyped-call]
        if self.case.norm == "layer":
            return _GemsLayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
        if self.case.norm == "instance":
            from flag_gems.fused.instance_norm import instance_norm

            return instance_norm(x, weight, bias, eps=eps)
        from flag_gems.ops.rms_norm import rms_norm

        return rms_norm(x, weight.shape, weight, eps)


def _gems_lacks(case: Case, device: str, training: bool) -> str | None:
    if case.norm == "batch" and not training:
        return "its batch norm has no backward in eval mode"
    return "it reads rows of a matrix" if case.rows and len(case.shape) != 2 else None


# --- cuDNN through its graphs


_Build = Callable[[Any, dict[str, Any]], dict[str, Any]]  # (graph, its inputs by name) -> its outputs by name


class _Graph:
    """One built cuDNN graph. ``inputs`` and ``outputs`` are tensors to describe, by name; outputs are made anew by every call."""

    def __init__(self, build: _Build, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        import cudnn
        from cudnn.ops.norm._common import TORCH_DTYPE_TO_CUDNN, get_handle

        device = next(t.device for t in inputs.values() if t.is_cuda)
        self.graph = cudnn.pygraph(
            handle=get_handle(device),
            io_data_type=TORCH_DTYPE_TO_CUDNN[next(iter(inputs.values())).dtype],
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )
        self.ahead = {name: self.graph.tensor_like(t.detach()) for name, t in inputs.items()}
        self.behind = build(self.graph, self.ahead)
        self.like = {name: t.detach() for name, t in outputs.items()}
        for name, t in outputs.items():
            self.behind[name].set_output(True).set_data_type(TORCH_DTYPE_TO_CUDNN[t.dtype])
        self.graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])

    def __call__(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        from cudnn.ops.norm._common import get_handle

        device = next(t.device for t in inputs.values() if t.is_cuda)
        made = {name: outputs[name] if name in outputs else torch.empty_like(t) for name, t in self.like.items()}
        workspace = torch.empty(max(self.graph.get_workspace_size(), 1), dtype=torch.uint8, device=device)
        pack = {self.ahead[name]: t.detach() for name, t in inputs.items()}
        pack |= {self.behind[name]: t for name, t in made.items()}
        self.graph.execute(pack, workspace, handle=get_handle(device))
        return made


class _CudnnNorm(_Affine):
    """Batch norm with its ReLU, or instance norm, as cuDNN graphs; the backward recomputes the sign from x, so that only x is kept."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, case: Case) -> None:
        super().__init__(case, torch.float32)
        self.relu = case.norm == "batch" and case.act == "relu"
        self.graphs: dict[str, _Graph] = {}
        if case.norm == "batch":
            self.register_buffer("running_mean", torch.zeros(case.channels))
            self.register_buffer("running_var", torch.ones(case.channels))
        # passed by value: they stay on the host
        self.scalars = {"epsilon": torch.full((1, 1, 1, 1), self.eps), "momentum": torch.full((1, 1, 1, 1), 0.1)}

    def forward(self, x: Tensor) -> Any:
        return _CudnnFunction.apply(x, self.weight, self.bias, self)  # type: ignore[no-untyped-call]

    def ahead(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (1, -1, *[1] * (x.dim() - 2))
        inputs = {"input": x, "scale": weight.view(shape), "bias": bias.view(shape), "epsilon": self.scalars["epsilon"]}
        in_place: dict[str, Tensor] = {}
        batch = self.case.norm == "batch"
        statistics = torch.empty_like(inputs["scale"])
        if batch:
            in_place = {"next_mean": self.running_mean.view(shape), "next_var": self.running_var.view(shape)}
            inputs |= {
                "in_running_mean": in_place["next_mean"],
                "in_running_var": in_place["next_var"],
                "momentum": self.scalars["momentum"],
            }
        else:
            statistics = statistics.expand(x.shape[0], *statistics.shape[1:]).contiguous()

        def build(graph: Any, given: dict[str, Any]) -> dict[str, Any]:
            import cudnn

            if not batch:
                y, mean, rstd = graph.instancenorm(norm_forward_phase=cudnn.norm_forward_phase.TRAINING, **given)
                return {"y": y, "mean": mean, "rstd": rstd}
            y, mean, rstd, next_mean, next_var = graph.batchnorm(**given)
            return {"y": graph.relu(input=y) if self.relu else y, "mean": mean, "rstd": rstd, "next_mean": next_mean, "next_var": next_var}

        if "forward" not in self.graphs:
            self.graphs["forward"] = _Graph(build, inputs, {"y": x, "mean": statistics, "rstd": statistics, **in_place})
        found = self.graphs["forward"](inputs, in_place)
        return found["y"], found["mean"], found["rstd"]

    def back(self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = (1, -1, *[1] * (x.dim() - 2))
        inputs = {"input": x, "grad": dy, "scale": weight.view(shape), "mean": mean, "inv_variance": rstd}
        if self.relu:
            inputs["bias"] = bias.view(shape)

        def build(graph: Any, given: dict[str, Any]) -> dict[str, Any]:
            grad = given["grad"]
            if self.relu:
                y = graph.batchnorm_inference(**{name: t for name, t in given.items() if name != "grad"})
                grad = graph.relu_backward(loss=grad, input=y)
                grad.set_data_type(given["grad"].get_data_type())
            shared = {name: given[name] for name in ("input", "scale", "mean", "inv_variance")}
            backward = graph.batchnorm_backward if self.case.norm == "batch" else graph.instancenorm_backward
            dx, dw, db = backward(grad=grad, **shared)
            return {"dx": dx, "dw": dw, "db": db}

        if "backward" not in self.graphs:
            self.graphs["backward"] = _Graph(build, inputs, {"dx": x, "dw": inputs["scale"], "db": inputs["scale"]})
        found = self.graphs["backward"](inputs, {})
        return found["dx"], found["dw"].view(-1), found["db"].view(-1)


class _CudnnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: _CudnnNorm) -> Tensor:
        y, mean, rstd = norm.ahead(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.norm = norm
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        layout = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
        dy = dy.contiguous(memory_format=layout if ctx.norm.case.layout == CHANNELS_LAST else torch.contiguous_format)
        return (*ctx.norm.back(dy, x, weight, bias, mean, rstd), None)


class _CudnnRows(_Affine):
    def __init__(self, case: Case) -> None:
        super().__init__(case, bias=case.norm == "layer")

    def forward(self, x: Tensor) -> Any:
        from cudnn.ops.norm import layer_norm, rms_norm

        if self.bias is None:
            return rms_norm(x, self.weight, eps=self.eps)
        return layer_norm(x, self.weight.shape, self.weight, self.bias, eps=self.eps)


def _cudnn(case: Case) -> nn.Module:
    if case.rows:
        return Chain(_CudnnRows(case), activation(case), case.residual)
    norm = _CudnnNorm(case)
    return Chain(norm, None if norm.relu else activation(case), case.residual)


def _cudnn_lacks(case: Case, device: str, training: bool) -> str | None:
    if case.norm == "batch" and (case.residual or case.layout != CHANNELS_LAST):
        return "its graph of batch norm and ReLU wants channels_last, and a tensor to compare with where a residual is added"
    if case.norm == "batch" and not training:
        return "its graphs normalize with the batch's statistics"
    return None


# --- In-Place ABN


class _InPlaceABN(nn.Module):
    """It writes over its input, which a leaf of autograd does not allow: a copy is made first, and is in its figures."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        from inplace_abn import InPlaceABN

        slope = 1.0 if case.act == "elu" else 0.01
        norm = InPlaceABN(case.channels, eps=eps_of(case), activation=case.act, activation_param=slope)
        self.norm = norm.to(case.parameter_dtype)

    def forward(self, x: Tensor) -> Any:
        return self.norm(x.clone())


def _abn_lacks(case: Case, device: str, training: bool) -> str | None:
    if case.act not in ("identity", "leaky_relu", "elu") or case.residual:
        return "it has only activations that can be inverted (identity, leaky_relu, elu), and no residual"
    if case.dtype == torch.bfloat16 or (case.dtype == torch.float16 and device == "cpu"):
        return f"it has no kernels for {str(case.dtype).removeprefix('torch.')} here"
    return "its backward is for training mode" if not training else None


# --- apex


class _ApexBatchNorm(nn.Module):
    """Its tensors are (N, H, W, C): views of channels_last maps."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC

        self.norm = BatchNorm2d_NHWC(case.channels, fuse_relu=case.act == "relu")
        self.norm.eps = eps_of(case)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        last = None if residual is None else residual.movedim(1, -1)
        y: Tensor = self.norm(x.movedim(1, -1), last).movedim(-1, 1)
        return y


def _apex(case: Case) -> nn.Module:
    if case.norm == "batch":
        return _ApexBatchNorm(case)
    if case.norm == "group":
        from apex.contrib.group_norm import GroupNorm

        fused = case.act == "silu" and case.residual is None
        norm = GroupNorm(case.groups, case.channels, eps=eps_of(case), act="silu" if fused else "").to(case.parameter_dtype)
        return Chain(norm, None if fused else activation(case), case.residual)
    from apex.normalization import FusedLayerNorm, FusedRMSNorm

    return _chain((FusedLayerNorm if case.norm == "layer" else FusedRMSNorm)(case.channels, eps=eps_of(case)), case)


def _apex_lacks(case: Case, device: str, training: bool) -> str | None:
    if case.norm in ("batch", "group") and (case.layout != CHANNELS_LAST or len(case.shape) != 4):
        return "its batch and group norm want channels_last maps"
    if case.norm == "batch" and (case.dtype != torch.float16 or case.act not in ("identity", "relu") or case.channels % 4):
        return "its batch norm is for float16, ReLU or nothing behind it, and multiples of 4 channels"
    if case.norm == "batch" and ((case.residual and case.act != "relu") or not training):
        return "its batch norm adds only before ReLU, and has no backward in eval mode"
    if case.norm == "group" and case.groups not in (16, 32):
        return "its group norm is for 16 or 32 groups"
    return None


PEERS: dict[str, Peer] = {
    "timm": Peer("timm.layers", "pip install timm", _timm, _all(_only("batch", "group", "frn"), _timm_lacks), gpu_only=False),
    "cudnn-frontend": Peer(
        "cudnn.ops.norm",
        "pip install nvidia-cudnn-frontend",
        _cudnn,
        _all(_only("batch", "instance", "layer", "rms"), _cudnn_lacks),
    ),
    "liger-kernel": Peer("liger_kernel.transformers", "pip install liger-kernel", _liger, _only("group", "layer", "rms")),
    "quack-kernels": Peer("quack.rmsnorm", "pip install quack-kernels", _quack, _only("layer", "rms")),
    "torchnorm": Peer(
        "torchnorm",
        "pip install torchnorm",
        _torchnorm,
        _all(_torchnorm_calls_torch, _only("layer", "rms")),
        gpu_only=False,
    ),
    "flag-gems": Peer(
        "flag_gems", "pip install flag-gems", lambda case: Chain(_Gems(case), activation(case), case.residual),
        _all(_only("batch", "group", "instance", "layer", "rms"), _gems_lacks),
    ),
    "inplace-abn": Peer(
        "inplace_abn", "pip install --no-build-isolation inplace-abn", lambda case: Chain(_InPlaceABN(case), None, None),
        _all(_only("batch"), _abn_lacks), gpu_only=False,
    ),
    "apex": Peer(
        "apex.normalization", "build it from github.com/NVIDIA/apex (PyPI's apex is another project)", _apex,
        _all(_only("batch", "group", "layer", "rms"), _apex_lacks),
    ),
}  # fmt: skip
