"""The comparison with float64 accepts what is right and finds every planted fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normfused.benchmark.accuracy import Oracle, allowed, error_against_float64, errors
from normfused.benchmark.cases import CHANNELS_LAST, Case
from normfused.benchmark.providers import Provider, eager, ours

F32 = torch.float32
BATCH = Case("batch", (4, 8, 6, 6), "relu", "pre_act", dtype=F32)
ADD_RMS = Case("rms", (16, 64), residual="pre_norm", dtype=F32)
CASES = [
    BATCH,
    ADD_RMS,
    Case("batch", (8, 12), "silu", dtype=F32),
    Case("group", (2, 8, 6, 6), "silu", groups=4, dtype=F32, layout=CHANNELS_LAST),
    Case("instance", (1, 4, 6, 6, 6), "leaky_relu", dtype=F32),
    Case("layer", (2, 8, 6, 6), "gelu", dim=1, dtype=F32),
    Case("layer", (1, 64), dtype=F32),
    Case("frn", (2, 8, 6, 6), "tlu", dtype=F32),
    Case("batch_instance", (2, 8, 6, 6), "hardswish", dtype=F32),
]


def changed(alter: Callable[[Any], None], start: Callable[[Case], nn.Module] = eager) -> Provider:
    """The eager chain with something wrong in it."""

    def make(case: Case) -> nn.Module:
        module = start(case)
        alter(module)
        return module

    return Provider("wrong", make)


class Wrapped(nn.Module):
    """A chain whose inputs and outputs pass through ``around``."""

    def __init__(self, chain: nn.Module, around: Callable[..., Any]) -> None:
        super().__init__()
        self.chain, self.around = chain, around

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.around(self.chain, *inputs)


def around(function: Callable[..., Any]) -> Provider:
    return Provider("wrong", lambda case: Wrapped(eager(case), function))


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return ctx.change(g), None


class GradientOfWeight(nn.Module):
    """Batch norm whose gradient of the weight is changed on its way."""

    def __init__(self, norm: nn.BatchNorm2d, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.change = norm.weight, norm.bias, change
        for name, buffer in norm.named_buffers():
            self.register_buffer(name, buffer)
        self.eps = norm.eps

    def forward(self, x):
        weight = ScaledGradient.apply(self.weight, self.change)
        return F.batch_norm(x, self.running_mean, self.running_var, weight, self.bias, self.training, 0.1, self.eps)


class UnbiasedStatistics(GradientOfWeight):
    """Normalizes with the unbiased variance."""

    def forward(self, x):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=1, keepdim=True)
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), 0.1)
            self.running_var.lerp_(var.flatten(), 0.1)
        return (x - mean) * (var + self.eps).rsqrt() * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class BiasedRunning(GradientOfWeight):
    """Right, but for the biased variance in the running statistics."""

    def forward(self, x):
        with torch.no_grad():
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var, 0.1)
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.1, self.eps)


def norm_becomes(kind: Callable[..., nn.Module], change: Callable[[torch.Tensor], torch.Tensor] = lambda g: g) -> Provider:
    def alter(chain: Any) -> None:
        chain.norm = kind(chain.norm, change)

    return changed(alter)


def without_eps(chain: Any) -> None:
    chain.norm.eps = 1e-30  # torch takes no 0


def without_act(chain: Any) -> None:
    chain.act = None


def frozen_statistics(chain: Any) -> None:
    chain.norm.momentum = 0.0


FAULTS: dict[str, tuple[Provider, Case, str]] = {
    "eps missing, batch": (changed(without_eps), BATCH, ""),
    "eps missing, rms": (changed(without_eps), ADD_RMS, ""),
    "eps missing, group": (changed(without_eps), CASES[3], ""),
    "eps missing, one row": (changed(without_eps), CASES[6], ""),
    "unbiased variance": (norm_becomes(UnbiasedStatistics), BATCH, ""),
    "biased running variance": (norm_becomes(BiasedRunning), BATCH, "running variance"),
    "running statistics not updated": (changed(frozen_statistics), BATCH, "running"),
    "activation forgotten": (changed(without_act), BATCH, ""),
    "gradient of the residual dropped": (around(lambda chain, x, r: chain(x, r.detach())), BATCH, "dresidual"),
    "gradient of x + residual dropped": (around(lambda chain, x, r: (chain(x, r)[0], (x + r).detach())), ADD_RMS, ""),
    "x + residual rounded": (around(lambda chain, x, r: (chain(x, r)[0], (x + r).bfloat16().float())), ADD_RMS, "x + residual"),
    "gradient of the weight scaled": (norm_becomes(GradientOfWeight, lambda g: 1.01 * g), BATCH, "gradient of parameter 0"),
    "gradient of the weight rounded": (norm_becomes(GradientOfWeight, lambda g: g.bfloat16().float()), BATCH, "gradient of parameter 0"),
    "y not finite": (around(lambda chain, x, r: chain(x, r) / 0), BATCH, "y"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str) -> None:
    provider, case, worst = FAULTS[fault]
    found = errors(provider, case, "cpu")
    assert found.wrong
    assert found.of_allowed > 2
    assert worst in found.worst


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_what_is_right_is_accepted(case: Case, training: bool, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    oracle = Oracle(case, "cpu", training)
    for provider in (Provider("eager", eager), Provider("ours", ours("torch"))):
        found = errors(provider, case, "cpu", training, oracle)
        assert found.of_allowed <= 1, (provider.name, found)
        assert found.max_err <= allowed(case, found.worst)


def test_one_oracle_serves_many_providers() -> None:
    oracle = Oracle(BATCH, "cpu")
    first = errors(Provider("eager", eager), BATCH, "cpu", oracle=oracle)
    assert errors(FAULTS["activation forgotten"][0], BATCH, "cpu", oracle=oracle).wrong
    assert errors(Provider("eager", eager), BATCH, "cpu", oracle=oracle) == first
    assert {"y", "dx", "dresidual", "running mean", "running variance"} <= set(oracle.wanted)
    assert "x + residual" in Oracle(ADD_RMS, "cpu").wanted


def test_an_oracle_of_another_case_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^errors: oracle must be of rms.*got batch"):
        errors(Provider("eager", eager), replace(ADD_RMS, residual=None), "cpu", oracle=Oracle(BATCH, "cpu"))


def test_a_provider_may_write_over_what_it_is_given() -> None:
    """What the next provider is compared with stays as it was."""
    oracle = Oracle(replace(BATCH, residual=None), "cpu")
    before = oracle.x.clone()

    def spoil(chain: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = chain(x.clone())
        x.data.zero_()
        return y

    errors(around(spoil), oracle.case, "cpu", oracle=oracle)
    assert torch.equal(oracle.x, before)


def test_chunks_do_not_change_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = FAULTS["gradient of the weight scaled"][0]
    whole = errors(provider, BATCH, "cpu")
    monkeypatch.setattr("normfused.benchmark.accuracy._CHUNK", 7)
    assert errors(provider, BATCH, "cpu") == whole


def test_missing_numbers_are_infinitely_wrong() -> None:
    found = errors(FAULTS["y not finite"][0], BATCH, "cpu")
    assert math.isinf(found.of_allowed)


def test_the_single_figure_is_of_allowed() -> None:
    provider = Provider("eager", eager)
    assert error_against_float64(provider, BATCH, "cpu") == errors(provider, BATCH, "cpu").of_allowed


def test_the_gate_has_a_gradient_that_is_more_than_rounding() -> None:
    """Were the batch's and the samples' statistics the same, the gate's gradient would be a difference of equal numbers."""
    wanted = Oracle(Case("batch_instance", (8, 16, 32, 32), dtype=torch.bfloat16), "cpu").wanted
    assert wanted["gradient of parameter 2"].abs().max() > 0.1 * wanted["gradient of parameter 0"].abs().max()
