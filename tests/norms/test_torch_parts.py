"""What the torch backend does in parts, against float64: mean-only batch norm of half types, the centre of group norm in channels_last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import normfused as nf
from normfused.backends.torch import mean_only

ACTS: dict[str, Any] = {
    "identity": lambda z, a: z,
    "silu": lambda z, a: F.silu(z),
    "relu": lambda z, a: F.relu(z),
    "prelu": lambda z, a: torch.where(z > 0, z, a.view(1, -1, 1, 1) * z),
    "tlu": lambda z, a: torch.where(z < a.view(1, -1, 1, 1), a.view(1, -1, 1, 1), z),
}


@pytest.mark.parametrize(
    ("act", "mode", "scaled", "dtype", "channels_last", "offset"),
    [
        ("silu", None, False, torch.bfloat16, True, 0.0),
        ("silu", "pre_act", False, torch.float16, False, 0.0),
        ("identity", "pre_act", True, torch.bfloat16, False, 0.0),
        ("relu", "pre_act", False, torch.bfloat16, True, 0.0),
        ("prelu", "post_act", True, torch.float16, True, 0.0),
        ("tlu", None, False, torch.float16, True, 0.0),
        ("identity", None, False, torch.float16, True, 1000.0),
        ("silu", "post_act", True, torch.bfloat16, False, 30.0),
    ],
)
def test_mean_only_of_half_types(
    act: str, mode: str | None, scaled: bool, dtype: torch.dtype, channels_last: bool, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of two samples, the last of one: everything is rounded once."""
    monkeypatch.setattr(mean_only, "_ELEMENTS", 2 * 6 * 5 * 4)
    torch.manual_seed(0)
    memory = torch.channels_last if channels_last else torch.contiguous_format

    def made(*shape: int, plus: float = 0.0) -> Tensor:
        t = (torch.randn(shape) + plus).to(dtype)
        return (t.contiguous(memory_format=memory) if t.dim() == 4 else t).requires_grad_()

    given = {"x": made(5, 6, 5, 4, plus=offset), "bias": made(6)}
    if scaled:
        given["scale"] = made(6)
    if mode is not None:
        given["residual"] = made(5, 6, 5, 4)
    if act in ("prelu", "tlu"):
        given["act_param"] = made(6)
    wide = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    running = torch.zeros(6)
    options: dict[str, Any] = {"act": act, "residual_mode": mode or "pre_act", "backend": "torch", "running_mean": running}
    y = nf.functional.mean_only_batch_norm_act(training=True, momentum=1.0, **given, **options)
    z = wide["x"] * (wide["scale"].view(1, -1, 1, 1) if scaled else 1)
    mean = z.mean((0, 2, 3), keepdim=True)
    z = z - mean + wide["bias"].view(1, -1, 1, 1)
    expected = ACTS[act](z + wide["residual"] if mode == "pre_act" else z, wide.get("act_param"))
    expected = expected + wide["residual"] if mode == "post_act" else expected
    eps = torch.finfo(dtype).eps
    wider = 1e-6 * (1 + abs(offset))  # float32's share
    torch.testing.assert_close(y.double(), expected, rtol=eps, atol=wider)
    torch.testing.assert_close(running.double(), mean.flatten(), rtol=1e-6, atol=wider)
    assert y.is_contiguous(memory_format=memory)
    dy = torch.randn(y.shape).to(dtype)
    y.backward(dy)
    expected.backward(dy.double())
    if offset == 0 and act == "relu" and mode == "pre_act":
        assert torch.equal(y > 0, expected > 0)
    for name, t in given.items():
        of = wide[name].grad
        assert t.grad is not None and of is not None
        sums = 1 if t.dim() == 4 else 30  # of 100 values, and of their products with x - mean
        torch.testing.assert_close(
            t.grad.double(), of, rtol=eps, atol=sums * 1e-6 * (1 + abs(offset)), msg=lambda m, name=name: f"{name}: {m}"
        )


def test_mean_only_of_half_types_twice() -> None:
    """The gradient of the gradient is the formulas'."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 5).bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    y = nf.functional.mean_only_batch_norm_act(x, None, training=True, act="silu", backend="torch")
    z = F.silu(wide - wide.mean((0, 2, 3), keepdim=True))
    found = []
    for output, t in ((y, x), (z, wide)):
        (first,) = torch.autograd.grad(output.square().sum(), t, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), t)[0].double())
    assert float((found[0] - found[1]).abs().max()) < 0.05 * float(found[1].abs().max())


@pytest.mark.parametrize("background", [0.0, 1000.0])
@pytest.mark.parametrize("groups", [2, 8])
def test_group_norm_whose_sampled_rows_are_unlike_the_rest(groups: int, background: float) -> None:
    """The centre comes from every eighth row: there stands something else, which is at worst an eighth of a set."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16, 16) + background
    x[:, :, ::8] = 0.0
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    wide = x.detach().double().requires_grad_()
    dy = torch.randn(2, 8, 16, 16)
    y, expected = nf.functional.group_norm_act(x, groups, backend="torch"), F.group_norm(wide, groups)
    y.backward(dy)
    expected.backward(dy.double())
    # eight times the rounding of a sum of squares; what (x - mean) has lost in x is x's own rounding
    lost = 8 * 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=lost * float(expected.abs().max()))
    assert x.grad is not None and wide.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0, atol=lost * float(wide.grad.abs().max()))
