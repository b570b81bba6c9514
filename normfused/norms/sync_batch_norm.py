"""Batch normalization over the batch of all processes of a group (scope channel, rule standard)."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

from torch import Tensor, nn

from .. import checks, distributed, ops
from ..activations import ActivationLike
from ..problem import CHANNEL, PRE_ACT, STANDARD
from .base import call, own
from .batch_norm import _BatchNormAct, batch_norm_act, check_batch_norm


def sync_batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    act: ActivationLike = "identity",
    act_param: Tensor | None = None,
    residual: Tensor | None = None,
    residual_mode: str = PRE_ACT,
    num_batches_tracked: Tensor | None = None,
    backend: str | None = None,
    memory_efficient: bool = False,
    process_group: Any = None,
) -> Tensor:
    r"""`batch_norm_act` with the statistics of the batches of all processes of a group, as if they were one batch.

    .. math:: n = \sum_k n_k,\quad \mu = \frac1n \sum_k n_k \mu_k,\quad v = \frac1n \sum_k n_k \big(v_k + (\mu_k - \mu)^2\big)

    Every process of the group calls it together, with equal C and types; batches may differ in size and be empty. One all-gather of
    2C + 1 float32 numbers (float64 for float64) forward, one of 2C backward; all processes get the same statistics, bit by bit.
    Running statistics move by the global batch, with the unbiased variance of its count; where all processes together hold one value
    per channel, or none, they stay as they were (the host does not know the count, so nothing is raised).
    Without ``training``, without an initialised `torch.distributed`, and in a group of one process it is `batch_norm_act`.

    Args:
        process_group: a `torch.distributed.ProcessGroup`; None (default) for all processes.
        all others: as in `batch_norm_act`; x is this process's part, (N, C, \*), N >= 0.

    Returns:
        Tensor like x, in x's memory format.

    Raises:
        ValueError: this process is not in ``process_group``. RuntimeError: called inside torch.func, forward-mode AD or torch.export
            while it has to synchronize. All others as in `batch_norm_act`.

    The gradient is that of the sum of all processes' losses; those of weight, bias and act_param are this process's share, which
    DistributedDataParallel averages. Differentiable twice (every process must then differentiate twice); deterministic.

    Reference: Ioffe & Szegedy, *Batch Normalization*, arXiv 1502.03167; the merge: Chan, Golub & LeVeque, 1979.
    """
    op = "sync_batch_norm_act"
    group = distributed.group_of(process_group) if training else None
    if group is None:
        return batch_norm_act(
            x, running_mean, running_var, weight, bias, training, momentum, eps, act=act, act_param=act_param, residual=residual,
            residual_mode=residual_mode, num_batches_tracked=num_batches_tracked, backend=backend, memory_efficient=memory_efficient,
        )  # fmt: skip
    checks.floating(op, x)
    check_batch_norm(op, x, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    if x.shape[1] == 0:
        raise ValueError(f"{op}: input must have at least 1 channel (dim 1), got shape {tuple(x.shape)}")
    if ops.see_through():
        raise RuntimeError(
            f"{op}: torch.func, forward-mode AD and torch.export cannot see through an exchange between processes, got training=True in a"
            f" group of {group.size} processes; use eval mode"
        )
    y: Tensor = call(
        op, x, weight, bias, CHANNEL, STANDARD, 1, eps, act, act_param, residual, residual_mode, backend,
        running_mean=running_mean, running_var=running_var, counter=num_batches_tracked, momentum=momentum,
        run=partial(distributed.norm_act, group=group, keeps_y=memory_efficient),
    )  # fmt: skip
    return y


class SyncBatchNormAct(_BatchNormAct):
    r"""`torch.nn.SyncBatchNorm` with a fused activation and residual add, on CPU too; see `sync_batch_norm_act`.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, bias: as `torch.nn.SyncBatchNorm`, in
            its order. ``process_group=None`` (default) synchronizes all processes.
        act: None (default), a name, ``(name, parameters)``, a torch activation module, or any callable (composed, not fused).
        residual_mode: ``"pre_act"`` (default) or ``"post_act"``; where ``forward(input, residual)`` adds its second argument.
        memory_efficient: as in `batch_norm_act`; the first training forward raises where a weight is too near 0.
        backend: None (default: the selected one) or a backend's name, for this layer alone.

    Shape: (N, C, \*) in and out, at least 2 dimensions. State dict: that of ``torch.nn.SyncBatchNorm`` and ``torch.nn.BatchNorm*``.

    It synchronizes in training, if `torch.distributed` is initialised and the group has more than one process; else it is
    `BatchNormAct*`. It is a ``_BatchNorm`` but no ``torch.nn.SyncBatchNorm``, which DistributedDataParallel refuses on CPU. A copy keeps
    the group; a pickled layer that has one cannot be made, as groups belong to a process: set ``process_group=None`` first.

    Reference: Ioffe & Szegedy, *Batch Normalization*, arXiv 1502.03167.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        act: ActivationLike = None,
        residual_mode: str = PRE_ACT,
        memory_efficient: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, act=act, residual_mode=residual_mode, memory_efficient=memory_efficient, backend=backend,
        )  # fmt: skip
        self.process_group = process_group

    @classmethod
    def from_batch_norm(cls, layer: nn.modules.batchnorm._BatchNorm, process_group: Any = None) -> SyncBatchNormAct:
        """The synchronized layer in place of ``layer``, with the same parameter, buffer and activation objects, options and mode.

        Args:
            layer: ``torch.nn.BatchNorm*``, ``torch.nn.SyncBatchNorm`` or ``BatchNormAct*``.
            process_group: as in the constructor.

        Raises:
            TypeError: another layer, or one that has still to see its first input.
        """
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or isinstance(layer, nn.modules.lazy.LazyModuleMixin):
            raise TypeError(f"SyncBatchNormAct.from_batch_norm: layer must be a batch norm of known size, got {type(layer).__name__}")
        made = cls(
            layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats, process_group, "meta",
            act=getattr(layer, "act", None), residual_mode=getattr(layer, "residual_mode", PRE_ACT),
            memory_efficient=getattr(layer, "memory_efficient", False), backend=getattr(layer, "backend", None),
        )  # fmt: skip
        made._parameters.update(layer._parameters)
        made._buffers.update(layer._buffers)
        made._non_persistent_buffers_set |= layer._non_persistent_buffers_set
        made.training = layer.training
        if hasattr(layer, "qconfig"):
            made.qconfig = layer.qconfig
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNormAct:
        copy = self.__new__(type(self))
        memo[id(self)] = copy
        memo[id(self.process_group)] = self.process_group
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        running_mean, running_var, counter, momentum, batch_statistics = self._statistics()
        # deferred initialization tries a layer out on meta, where there is nothing to exchange
        run = partial(sync_batch_norm_act, process_group=self.process_group) if self.training and not input.is_meta else batch_norm_act
        weight, bias = own(self, "weight"), own(self, "bias")
        return run(
            input, running_mean, running_var, weight, bias, batch_statistics, momentum, self.eps,
            act=self.act, residual=residual, residual_mode=self.residual_mode, num_batches_tracked=counter, backend=self.backend,
            memory_efficient=self._keeps_y(input, weight, bias),
        )  # fmt: skip
