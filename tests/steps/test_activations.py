"""The activations below the norms: derivatives against finite formulas, from z and from y, in place, and how one may be named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normfused import ACTIVATIONS
from normfused.activations import Activation, activate, grad_activate, grad_activate_from_y, parse
from normfused.backends.torch.activation import activate_, grad_activate_
from tests.support.formulas import ACT_NUMBERS, activation

NUMBERS = {**{k: tuple(v.values()) for k, v in ACT_NUMBERS.items()}}
WEIGHT = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)


def _act(name: str) -> Activation:
    return Activation(name, *NUMBERS.get(name, ACTIVATIONS[name]))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_derivative(name: str) -> None:
    """Far into both tails, from z, by ATen's one-pass kernels, and from y where y determines it."""
    z = torch.linspace(-9.05, 9.1, 300, dtype=torch.float64).view(10, 3, 10)
    dy = torch.linspace(-1, 2, 300, dtype=torch.float64).view(10, 3, 10)
    act, weight = _act(name), WEIGHT if name in ("prelu", "tlu") else None
    leaf, wide = z.clone().requires_grad_(), None if weight is None else weight.clone().requires_grad_()
    y = activation(name, leaf, None if wide is None else wide.view(1, 3, 1))
    want = torch.autograd.grad(y, [leaf] if wide is None else [leaf, wide], dy)
    for value in (activate(z, act, weight), activate_(z.clone(), act, weight)):
        torch.testing.assert_close(value, y.detach(), rtol=1e-12, atol=1e-12)
    for dz, dweight in (grad_activate(dy, z, act, weight), grad_activate_(dy, z.clone(), act, weight)):
        # ATen's hardsigmoid_backward holds 1/6 in float32
        torch.testing.assert_close(dz, want[0], rtol=1e-7 if name == "hardsigmoid" else 1e-11, atol=1e-12)
        if weight is not None:
            assert dweight is not None
            torch.testing.assert_close(dweight.sum((0, 2)), want[1], rtol=1e-11, atol=1e-12)
    if act.derivative_from_y(torch.float64):
        torch.testing.assert_close(grad_activate_from_y(dy, y.detach(), act), want[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_kinks_and_nan(name: str) -> None:
    """At 0 the derivative of relu is 0, as in torch; a tie of tlu counts as z; NaN passes through."""
    z = torch.tensor([[0.0, float("nan"), 6.0]], dtype=torch.float64)
    act = _act(name)
    weight = torch.zeros(1, dtype=torch.float64) if act.takes_weight else None
    y = activate(z, act, weight)
    assert y.isnan().tolist() == [[False, True, False]]
    dz, _ = grad_activate(torch.ones_like(z), z, act, weight)
    if name in ("relu", "relu6"):
        assert dz[0, 0] == 0
    if name == "relu6":
        assert dz[0, 2] == 0
    if name == "tlu":
        assert dz[0, 0] == 1


def test_half_types_keep_what_their_rounding_would_lose() -> None:
    """A derivative is taken from y only where y's rounding does not change it."""
    exact = {n for n in ACTIVATIONS if _act(n).derivative_from_y(torch.bfloat16)}
    assert exact == {"relu", "leaky_relu"}
    assert not Activation("leaky_relu", -0.1).derivative_from_y(torch.float32)
    assert not Activation("elu", 0.0).derivative_from_y(torch.float32)
    assert not Activation("softplus", 1.5, 4.0).derivative_from_y(torch.float32)
    assert Activation("softplus", 1.0, 20.0).derivative_from_y(torch.float32)


def test_names() -> None:
    assert parse(None) == parse("none") == parse(nn.Identity()) == Activation("identity")
    assert parse("SiLU") == parse("swish") == parse(nn.SiLU()) == parse(nn.functional.silu)
    assert parse(("leaky_relu", {"negative_slope": 0.3, "inplace": True})) == parse(nn.LeakyReLU(0.3)) == Activation("leaky_relu", 0.3)
    assert parse(("gelu", {"approximate": "tanh"})) == parse(nn.GELU("tanh")) == Activation("gelu_tanh")
    assert parse("softplus") == Activation("softplus", 1.0, 20.0)
    assert parse(torch.sin) is torch.sin
