"""Running statistics against the recurrence over several steps, and everything that must leave them alone."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfused as nf
from tests.support.check import DEVICE, close, data, layout
from tests.support.family import whiten

SHAPES = [(4, 6), (2, 6), (3, 6, 5), (3, 6, 2), (3, 6, 4, 3), (2, 6, 3, 2, 2)]  # of two values the unbiased variance is twice the biased


def _expected(batches: list[Tensor], momentum: float | None, instance: bool) -> tuple[Tensor, Tensor]:
    mean, var = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    for step, x in enumerate(batches, 1):
        flat = x.double().cpu().flatten(2) if x.dim() > 2 else x.double().cpu().unsqueeze(2)
        if instance:
            m = flat.mean(2).mean(0)
            v = ((flat - flat.mean(2, keepdim=True)).square().sum(2) / (flat.shape[2] - 1)).mean(0)
        else:
            m = flat.mean((0, 2))
            v = (flat - m.view(1, 6, 1)).square().sum((0, 2)) / (flat.shape[0] * flat.shape[2] - 1)
        k = 1 / step if momentum is None else momentum
        mean, var = (1 - k) * mean + k * m, (1 - k) * var + k * v
    return mean, var


def _layer(shape: tuple[int, ...], instance: bool, backend: str, **options: Any) -> nn.Module:
    d = max(len(shape) - 2, 1)
    cls = getattr(nf, f"{'Instance' if instance else 'Batch'}NormAct{d}d")
    layer: nn.Module = cls(6, track_running_stats=options.pop("track_running_stats", True), backend=backend, **options).to(DEVICE)
    return layer


@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize("momentum", [*(pytest.param(m, marks=pytest.mark.triton_surface) for m in (0.1, None)), 0.01, 0.0, 1.0])
def test_recurrence(momentum: float | None, instance: bool, backend: str) -> None:
    """Several steps of every shape, type and layout; half data with float32 buffers loses nothing to the buffers."""
    for shape in SHAPES:
        if instance and len(shape) == 2:
            continue
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-6)):
            for channels_last in (False, True):
                layer = _layer(shape, instance, backend, momentum=momentum, act="relu")
                batches = [data(shape, dtype, seed=s) for s in range(4)]
                if channels_last:
                    batches = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in batches]
                for x in batches:
                    layer(x)
                mean, var = _expected(batches, momentum, instance)
                close("running_mean", layer.running_mean.cpu(), mean, tolerance)  # type: ignore[union-attr,operator]
                close("running_var", layer.running_var.cpu(), var, tolerance)  # type: ignore[union-attr,operator]
                counted = 4 if not instance or momentum is None else 0  # torch's instance norm does not count
                assert int(layer.num_batches_tracked) == counted  # type: ignore[arg-type]


def test_half_buffers_round_once(backend: str) -> None:
    """After .half() the buffers are float16: the new value is computed in float32 and rounded once."""
    layer = _layer((3, 6, 4, 3), False, backend).half()
    x = data((3, 6, 4, 3), torch.float16)
    layer(x)
    mean, var = _expected([x], 0.1, False)
    assert layer.running_mean.dtype == torch.float16  # type: ignore[union-attr]
    close("running_mean", layer.running_mean.cpu(), mean, 2.0**-11)  # type: ignore[union-attr,operator]
    close("running_var", layer.running_var.cpu(), var, 2.0**-11)  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("instance", [False, True])
def test_evaluation_reads_and_does_not_write(instance: bool, backend: str) -> None:
    layer = _layer((3, 6, 4, 3), instance, backend, affine=True)
    for s in range(2):
        layer(data((3, 6, 4, 3), seed=s))
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.eval()
    x = data((3, 6, 4, 3), seed=9)
    y = layer(x)
    for k, v in layer.state_dict().items():
        assert torch.equal(v, state[k]), k
    shape = (1, 6, 1, 1)
    m, v = (state[k].double().view(shape) for k in ("running_mean", "running_var"))
    close("y", y, (x.double() - m) / (v + 1e-5).sqrt(), 1e-5)


def test_no_tracking_uses_the_batch_in_evaluation_too(backend: str) -> None:
    layer = _layer((3, 6, 4, 3), False, backend, track_running_stats=False)
    assert layer.running_mean is None
    x = data((3, 6, 4, 3))
    trained = layer(x)
    assert torch.equal(trained, layer.eval()(x))


def test_buffers_set_to_none_later(backend: str) -> None:
    """`replace_all_batch_norm_modules_` does this: evaluation then takes the batch's statistics, as in torch."""
    layer, plain = _layer((3, 6, 4, 3), False, backend), nn.BatchNorm2d(6).to(DEVICE)
    x = data((3, 6, 4, 3))
    for module in (layer, plain):
        module.running_mean = module.running_var = module.num_batches_tracked = None  # type: ignore[assignment]
        module.track_running_stats = False  # type: ignore[assignment]
    for _ in range(2):
        close("y", layer(x), plain(x), 1e-5)
        layer.eval(), plain.eval()


def test_rewriting_the_buffers_between_forward_and_backward(backend: str) -> None:
    """DDP broadcasts buffers in place: two forwards before a backward must not see it, in training or evaluation."""
    for training, instance in itertools.product((True, False), (False, True)):
        x = data((3, 6, 4, 3)).requires_grad_()
        grads = []
        for disturb in (False, True):
            layer = _layer((3, 6, 4, 3), instance, backend, act="silu", affine=True).train(training)
            y = layer(x)
            if disturb:
                second = layer.train()(x * 2)
                layer.running_mean.fill_(7.0)  # type: ignore[union-attr,operator]
                layer.running_var.fill_(3.0)  # type: ignore[union-attr,operator]
                assert torch.isfinite(second).all()
            grads.append(torch.autograd.grad(y.square().sum(), (x, layer.weight)))
        for undisturbed, disturbed in zip(*grads, strict=True):
            assert torch.equal(undisturbed, disturbed)


def test_cumulative_average_without_reading_the_counter_on_the_host(backend: str) -> None:
    """momentum=None works on a counter that starts anywhere, such as one from a checkpoint."""
    layer = _layer((3, 6, 4, 3), False, backend, momentum=None)
    layer.num_batches_tracked.fill_(4)  # type: ignore[union-attr,operator]
    x = data((3, 6, 4, 3))
    layer(x)
    m = x.double().mean((0, 2, 3))
    close("running_mean", layer.running_mean.cpu(), (m / 5).cpu(), 1e-6)  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("instance", [False, True])
def test_an_empty_batch_counts_and_moves_nothing(instance: bool, backend: str) -> None:
    for momentum, shape in itertools.product((0.1, None), ((0, 6, 4, 3), (3, 6, 0, 3))):
        layer = _layer((3, 6, 4, 3), instance, backend, momentum=momentum)
        layer(data((3, 6, 4, 3)))
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        assert layer(torch.empty(shape, device=DEVICE)).shape == shape
        for k, v in layer.state_dict().items():
            counted = k == "num_batches_tracked" and not (instance and momentum is not None)
            assert torch.equal(v, before[k] + counted), (k, momentum, shape)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_reaches_its_channel_alone(bad: float, backend: str) -> None:
    """As in torch, whose CUDA kernels too make NaN of an infinite mean; and only that channel's."""
    layer, plain = _layer((3, 6, 4, 3), False, backend), nn.BatchNorm2d(6).to(DEVICE)
    x = data((3, 6, 4, 3))
    x[1, 2, 0, 1] = bad
    layer(x), plain(x)
    for name in ("running_mean", "running_var"):
        ours, theirs = getattr(layer, name), getattr(plain, name)
        reached = torch.arange(6, device=DEVICE) == 2
        assert torch.equal(~ours.isfinite(), reached) and (ours[2].isnan() or bad == bad)
        torch.testing.assert_close(ours[~reached], theirs[~reached])


def test_the_textbook_recurrence(backend: str) -> None:
    """Dive into Deep Learning's: moving <- 0.9*moving + 0.1*value, of the biased variance. Its mean is ours with momentum 1 - 0.9; its
    variance has (M - 1)/M of what the batches added to ours."""
    layer = _layer((3, 6, 4, 3), False, backend, momentum=1 - 0.9)
    mean, var, count = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64), 3 * 4 * 3
    batches = [data((3, 6, 4, 3), seed=s) for s in range(5)]
    for x in batches:
        layer(x)
        wide = x.double().cpu()
        mean, var = 0.9 * mean + 0.1 * wide.mean((0, 2, 3)), 0.9 * var + 0.1 * wide.var((0, 2, 3), correction=0)
    close("moving_mean", layer.running_mean.cpu(), mean, 1e-6)  # type: ignore[union-attr,operator]
    initial = 0.9 ** len(batches)
    converted = initial + (layer.running_var.double().cpu() - initial) * (count - 1) / count  # type: ignore[union-attr,operator]
    close("moving_var", converted, var, 1e-6)


# The statistics of a batch (N, C, S) in float64 that each layer averages; batch norm's own are in `_expected`
def _std(x: Tensor) -> Tensor:
    return (x.var((0, 2), correction=0) + 1e-5).sqrt()


def _pooled_unbiased(x: Tensor) -> Tensor:
    """Of the reference's switchable norm: the unbiased variances of slices and the spread of their means."""
    return x.var(2).mean(0) + x.mean(2).var(0, correction=0)


def _whitening(x: Tensor, method: str, d: int) -> Tensor:
    return whiten(x, d, method)[2].flatten()


FAMILY: dict[str, tuple[Any, dict[str, Any]]] = {
    "batch renorm": (nf.BatchRenormAct2d, {"running_std": _std}),
    "batch instance": (nf.BatchInstanceNormAct2d, {"running_var": lambda x: x.var((0, 2))}),
    "switch": (nf.SwitchNormAct2d, {"running_var": lambda x: x.var((0, 2), correction=0)}),
    "switch unbiased": (partial(nf.SwitchNormAct2d, unbiased_instance_var=True), {"running_var": _pooled_unbiased}),
    "mean only": (nf.MeanOnlyBatchNormAct2d, {}),
    "eval norm": (nf.EvalNorm2d, {"running_var": lambda x: x.var((0, 2))}),
    "eval norm, estimated": (partial(nf.EvalNorm2d, estimate=True), {"running_var": lambda x: x.var((0, 2))}),
    "newton": (partial(nf.IterNorm2d, num_channels=3), {"running_wm": partial(_whitening, method="newton", d=3)}),
    "zca": (partial(nf.IterNorm2d, num_channels=2, method="zca"), {"running_wm": partial(_whitening, method="zca", d=2)}),
}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_recurrence_of_the_family(name: str, momentum: float | None, backend: str) -> None:
    """Several steps, in either layout, of half data beside float32 buffers too."""
    make, kept = FAMILY[name]
    for dtype, form in ((torch.float32, "contiguous"), (torch.bfloat16, "channels_last")):
        layer = make(6, momentum=momentum, backend=backend).to(DEVICE)
        want = {n: getattr(layer, n).double().cpu().flatten() for n in ("running_mean", *kept)}
        for step in range(1, 4):
            x = layout(data((3, 6, 4, 5), dtype, seed=step), form)
            layer(x)
            flat, m = x.double().cpu().flatten(2), 1 / step if momentum is None else momentum
            for n, of in {"running_mean": lambda t: t.mean((0, 2)), **kept}.items():
                want[n] = (1 - m) * want[n] + m * of(flat)
        for n, value in want.items():
            close(n, getattr(layer, n).cpu().flatten(), value, 1e-5 if n == "running_wm" else 1e-6)
        assert int(layer.num_batches_tracked) == 3
