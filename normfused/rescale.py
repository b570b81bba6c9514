r"""Residual networks without normalization (RescaleNet): rescaled residuals, biases before the matrix product, their initialization.

A residual block adds a branch to its input. Without a norm the variance doubles with every block, to 2^16 after 16. Here
:math:`x_k = \alpha_k x_{k-1} + \beta_k F_k(x_{k-1})` with :math:`\alpha_k^2 + \beta_k^2 = 1` keeps it, and every block has the same
weight in the output; biases in front of the convolutions keep units from being dead or linear for all inputs, as a norm's mean does.

Reference: Shao, Hu, Wang, Xue & Raj, *Is normalization indispensable for training deep neural networks?*, NeurIPS 2020.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import checks
from .activations import ActivationLike, Composed, from_module, module_of
from .epilogues import affine_act, rescaled_residual
from .norms.base import known_backend, take_other_shapes
from .problem import accumulation_dtype

__all__ = ["InputBias", "RescaledResidual", "rescale_init_", "rescale_parameter_groups", "rescale_schedule"]


def _constant(op: str, num_blocks: int, c: float | None, first: int) -> float:
    if num_blocks < 1:
        raise ValueError(f"{op}: num_blocks must be at least 1, got {num_blocks}")
    value = float(num_blocks if c is None else c)
    if value <= 0 or first - 1 + value < 0:
        raise ValueError(f"{op}: c must be positive and at least 1 - index, got c={value:g} with index {first}")
    return value


def rescale_schedule(num_blocks: int, *, c: float | None = None, first: int = 0) -> list[tuple[float, float]]:
    r"""The coefficients of all residual blocks, :math:`\alpha_k = \sqrt{(k-1+c)/(k+c)}` and :math:`\beta_k = 1/\sqrt{k+c}`.

    They are the solution of :math:`\alpha_k^2 + \beta_k^2 = 1` that gives all branches the same weight in the output,
    :math:`1/\sqrt{K+c}` with the last index K; the network's input has :math:`\sqrt{(k_0-1+c)/(K+c)}` with the first, k_0.

    Args:
        num_blocks: L, at least 1.
        c: the constant (default L).
        first: the index of the first block. The authors' code counts from 0 with c = L (the default here, and in
            `RescaledResidual`); the paper counts from 1, which is the same with c = L - 1.

    Returns:
        A pair (alpha, beta) of numbers for every block, in order.

    Raises:
        ValueError: num_blocks below 1, or c so small that a root has no value.
    """
    c = _constant("rescale_schedule", num_blocks, c, first)
    return [(math.sqrt((k - 1 + c) / (k + c)), math.sqrt(1 / (k + c))) for k in range(first, first + num_blocks)]


class _Act(nn.Module):
    """The part that both layers share: the child ``act`` and the backend."""

    act: nn.Module | None

    def __init__(self, act: ActivationLike, channels: int, backend: str | None, device: Any, dtype: Any) -> None:
        super().__init__()
        known_backend(type(self).__name__, backend)
        self.act = module_of(act, channels, device, dtype)
        self.backend = backend

    def _repr(self, *own: str) -> str:
        act = self.act
        if act is not None:
            found = from_module(act)
            named = act.extra_repr() if isinstance(act, Composed) else type(act).__name__
            own = (*own, f"act={named} (composed)" if found is None else f"act={found}")
        if self.backend not in (None, "auto"):
            own = (*own, f"backend={self.backend}")
        return ", ".join(own)


def is_watched(module: nn.Module) -> bool:
    """Whether a hook waits for the module's own call."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(found) > 0 for found in hooks)


class InputBias(_Act):
    r"""A bias before the matrix product: :math:`y = \mathrm{act}(x) + b_c - \mu_c`, with :math:`\mu` measured once, in the first batches.

    It stands in front of a convolution or linear layer without bias of its own, and makes the mean of that layer's input zero at the
    start. (With zero padding it is not a bias after the convolution: the two differ at the border.)

    In training mode the first ``batches`` batches move ``init_mean`` to the average of their channel means, without gradient; the
    batch at hand is in the average that is subtracted from it, and b enters as 0.01 b. After them, and always in evaluation,
    ``init_mean`` is a constant. Nothing is read on the host for it, so that a CUDA graph or a compiled step may hold these batches;
    one that does measures the mean, for nothing, in later batches too: run them eagerly first where that matters.

    Args:
        num_features: C, the channels of x (dim 1).
        batches: T, how many batches the mean is measured over: 1 (default) as in the paper, 8 as in the authors' code; 0 for never.
        act: an activation in front of it, as `BatchNormAct2d` takes it: what the convolution before returned goes through both in one
            operation (default None).
        act_last: the activation follows the bias instead, :math:`\mathrm{act}(x + b_c - \mu_c)`: for a stem, whose bias comes after
            its convolution (default False).
        backend: None (default: the selected one) or a backend's name, for this layer alone.
        device, dtype: of the parameter and ``init_mean``.

    Shape: (N, C, \*) in and out, x's memory format.
    State dict: ``bias`` (C,), ``init_mean`` (C,), ``count`` (int64); ``act`` adds its own, if any. No weight decay belongs on the bias
    (`rescale_parameter_groups`). Each process of data-parallel training measures its own batches and DDP broadcasts the first one's.

    Reference: Shao et al., NeurIPS 2020.
    """

    init_mean: Tensor
    count: Tensor

    def __init__(
        self,
        num_features: int,
        batches: int = 1,
        act: ActivationLike = None,
        *,
        act_last: bool = False,
        backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if batches < 0:
            raise ValueError(f"InputBias: batches must be non-negative, got {batches}")
        super().__init__(act, num_features, backend, device, dtype)
        self.num_features, self.batches, self.act_last = num_features, batches, act_last
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.register_buffer("init_mean", torch.empty(num_features, device=device, dtype=dtype))
        self.register_buffer("count", torch.empty((), device=device, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Bias 0, and the mean is to be measured anew."""
        nn.init.zeros_(self.bias)
        self.init_mean.zero_()
        self.count.zero_()
        self._steps = 0  # counted on the host, at most count: spares the measurement once it is done

    def forward(self, input: Tensor) -> Tensor:
        checks.floating("InputBias", input)
        checks.min_dim("InputBias", input, 2)
        checks.channels("InputBias", input, self.num_features)
        checks.parameter("InputBias", "bias", self.bias, input, self.num_features)
        checks.statistic("InputBias", "init_mean", self.init_mean, input, self.num_features)
        wide = accumulation_dtype(input.dtype)
        measured: tuple[Tensor, Tensor] | None = None
        if self._measures() and input.numel() > 0:
            mean, first = measured = self._measure(input, wide)
            shift = self.bias.to(wide) * (1 - 0.99 * first.to(wide)) - mean
        else:
            shift = self._shift(wide)
        act: ActivationLike = "identity" if self.act is None else self.act
        before, after = (shift, None) if self.act_last else (None, shift)
        y = affine_act(input, None, before, act=act, shift_after=after, backend=self.backend)
        if measured is not None:  # not before the call that may raise
            self._keep(*measured)
        return y

    def _measures(self) -> bool:
        return self.training and self._steps < self.batches

    def _shift(self, wide: torch.dtype) -> Tensor:
        return self.bias.to(wide) - self.init_mean.to(wide)

    def next_bias(self, dtype: torch.dtype) -> Tensor | None:
        """:math:`b - \\mu` (C,), which the operation before may add to its output of type ``dtype`` (`rescaled_residual`), so that this
        layer need not be called; None where it must be: an activation of its own, the mean still to be measured, or hooks."""
        if self.act is not None or self._measures() or type(self) is not InputBias or is_watched(self):
            return None
        return self._shift(accumulation_dtype(dtype))

    @torch.no_grad()
    def _measure(self, input: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """(the mean so far, which this batch has entered if it is one of the first T; whether it is)."""
        value = input.detach()
        if self.act is not None and not self.act_last:
            value = affine_act(value, act=self.act, backend=self.backend)
        mean = value.mean([d for d in range(value.dim()) if d != 1], dtype=wide)
        old = self.init_mean.to(wide)
        first = self.count < self.batches
        return torch.where(first, old + (mean - old) / (self.count + 1), old), first

    @torch.no_grad()
    def _keep(self, mean: Tensor, first: Tensor) -> None:
        self.init_mean.copy_(mean)
        self.count.add_(first.to(torch.int64))
        if not torch.compiler.is_compiling() and not (mean.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._steps += 1

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        take_other_shapes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        count = state_dict.get(prefix + "count")
        if isinstance(count, Tensor) and not count.is_meta:
            self._steps = int(count)

    def extra_repr(self) -> str:
        own = [f"batches={self.batches}"] if self.batches != 1 else []
        own += ["act_last=True"] if self.act_last else []
        return self._repr(str(self.num_features), *own)


class RescaledResidual(_Act):
    r"""The end of block k of L without norms: :math:`y = \mathrm{act}\big(\alpha_k x + (m/\sqrt c)\, F\big)`, m learned.

    :math:`\alpha_k = \sqrt{(k-1+c)/(k+c)}`. The branch's factor at the start, :math:`1/\sqrt c`, is the same for all blocks; the
    rest of :math:`\beta_k = 1/\sqrt{k+c}` is in the first weights of its layers (`rescale_init_`).

    Args:
        index: k, from 0 to num_blocks - 1, counted through the whole network (c = L, the authors' numbering; for the paper's,
            index from 1 with c = L - 1).
        num_blocks: L.
        c: the constant (default num_blocks).
        act: as `BatchNormAct2d` takes it (default ``"relu"``).
        num_features: C, needed by ``act="tlu"`` alone.
        backend, device, dtype: as in `InputBias`.

    Shape: ``forward(x, branch)`` with two tensors (N, C, \*) alike. ``forward(x, branch, folded=True)`` takes a branch whose last
    layer had its weight from `fold`; m is then trained through that weight, which spares the pass over F that its gradient takes.
    With ``next_bias`` (C,) the pair (y, y + next_bias) is returned (`rescaled_residual`, `InputBias.next_bias`).
    State dict: ``multiplier`` (1,); ``act`` adds its own, if any. It is not to start at zero, and has no weight decay.

    Reference: Shao et al., NeurIPS 2020.
    """

    def __init__(
        self,
        index: int,
        num_blocks: int,
        *,
        c: float | None = None,
        act: ActivationLike = "relu",
        num_features: int = 1,
        backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if index < 0 or (c is None and index >= num_blocks):
            raise ValueError(f"RescaledResidual: index must be from 0 to num_blocks - 1 = {num_blocks - 1}, got {index}")
        super().__init__(act, num_features, backend, device, dtype)
        self.index, self.num_blocks, self.c = index, num_blocks, _constant("RescaledResidual", num_blocks, c, index)
        self.alpha = math.sqrt((index - 1 + self.c) / (index + self.c))
        self.branch_scale = 1 / math.sqrt(self.c)
        self.multiplier = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Multiplier 1."""
        nn.init.ones_(self.multiplier)

    def fold(self, weight: Tensor) -> Tensor:
        """``weight`` of the branch's last layer, which has no bias, times :math:`m/\\sqrt c`: a factor of few numbers, not of all maps."""
        return weight * (self.multiplier * self.branch_scale).to(weight.dtype)

    def forward(self, input: Tensor, branch: Tensor, *, folded: bool = False, next_bias: Tensor | None = None) -> Any:
        beta = None if folded else self.multiplier * self.branch_scale
        act: ActivationLike = "identity" if self.act is None else self.act
        return rescaled_residual(input, branch, self.alpha, beta, act=act, next_bias=next_bias, backend=self.backend)

    def extra_repr(self) -> str:
        c = () if self.c == self.num_blocks else (f"c={self.c:g}",)
        return self._repr(f"{self.index}, {self.num_blocks}", *c)


# ------------------------------------------------------------------------------------------------- initialization
_Layer = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def rescale_init_(layers: Iterable[nn.Module], index: int, num_blocks: int, *, c: float | None = None, drop: float = 0.0) -> None:
    r"""Initialize the convolutions or linear layers of one residual branch for `RescaledResidual` (normal distribution, in place).

    .. math:: \sigma = \sqrt{2/\mathrm{fan\_in}}\;\Big(\frac{c}{k+c}\Big)^{1/(2n)}\sqrt{1-p}

    with n layers in the branch: their product makes :math:`1/\sqrt c` into :math:`\beta_k = 1/\sqrt{k+c}`. (1/6 for the three
    convolutions of a bottleneck, 1/4 for the two of a basic block.) He's factor 2 is that of ReLU.

    Args:
        layers: the branch's layers, of `torch.nn`, all of them; biases they may have become 0.
        index, num_blocks, c: of the block's `RescaledResidual`.
        drop: p, the rate of dropout behind these layers (default 0).

    Raises:
        ValueError: no layers, drop outside of [0, 1). TypeError: a module that is none.
    """
    layers = list(layers)
    if not layers:
        raise ValueError("rescale_init_: layers must hold the branch's convolutions or linear layers, got none")
    if not 0 <= drop < 1:
        raise ValueError(f"rescale_init_: drop must be in [0, 1), got {drop}")
    c = _constant("rescale_init_", num_blocks, c, index)
    factor = (c / (index + c)) ** (1 / (2 * len(layers))) * math.sqrt(1 - drop)
    for layer in layers:
        if not isinstance(layer, _Layer):
            raise TypeError(f"rescale_init_: layers must be convolutions or linear layers of torch.nn, got {type(layer).__name__}")
        normal_init_(layer, 2.0, factor)


def normal_init_(layer: nn.Module, gain: float, factor: float = 1.0) -> None:
    """Weight from a normal distribution of variance gain*factor^2/fan_in (fan_in: inputs of one output), bias 0."""
    weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    nn.init.normal_(weight, std=factor * math.sqrt(gain / math.prod(weight.shape[1:])))
    if bias is not None:
        nn.init.zeros_(bias)


def rescale_parameter_groups(model: nn.Module, weight_decay: float) -> Sequence[dict[str, Any]]:
    """Parameter groups for an optimizer: ``weight_decay`` on all but multipliers, input biases and other biases.

    Args:
        model: any module.
        weight_decay: of the first group; the second has 0.

    Returns:
        Two dicts with ``params`` and ``weight_decay``.
    """
    spared = {id(p) for m in model.modules() if isinstance(m, (InputBias, RescaledResidual)) for p in m.parameters()}
    spared |= {id(p) for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    decayed = [p for p in model.parameters() if id(p) not in spared]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if id(p) in spared], "weight_decay": 0.0},
    ]
