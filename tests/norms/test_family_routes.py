"""Mean-only batch norm and Batch Renorm by the kernels' own rules: the route, what is saved, the order of the running statistics, limits.

Results against float64 are those of test_family_numbers.py, which runs on every backend.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import normfused as nf
import normfused.functional as NF
from tests.conftest import BACKENDS, INTERPRETED
from tests.support.check import DEVICE, data, layout
from tests.support.family import BY_NAME, EPS

NAMES = [name for name in BACKENDS if not name.startswith("torch")]  # those that have the rules
fused = pytest.mark.parametrize("name", NAMES)
LAYERS: dict[str, Any] = {"renorm": nf.BatchRenormAct2d, "mean_only": nf.MeanOnlyBatchNormAct2d}
F64 = torch.float64


@pytest.mark.parametrize("rule", LAYERS)
def test_route(rule: str, backend: str) -> None:
    """The kernels take them as batch norm; ATen, which has no kernel for them, as rules in PyTorch. Evaluation is batch norm's."""
    x = torch.randn(8, 6, 10, 9, device=DEVICE)
    layer = LAYERS[rule](6, act="relu", backend=backend, device=DEVICE)
    found = nf.explain(layer, x)
    if backend == "torch":
        assert found.path in ("slices", "composite")
        assert found.rule == "written in PyTorch"
        return
    assert (found.path, found.scope, found.rule) == ("fused", "channel", rule)
    assert found.saved_bytes == (4 if rule == "renorm" else 2) * 6 * 4, (
        "the centre and (scale, r, d), or the mean and ones; x is the caller's"
    )
    if found.plan:  # cuda, with the module that answers questions
        assert [line.split(",")[0] for line in found.plan] == ["forward: single_pass", "backward: single_pass"]
        assert all(line.endswith("asks for x 1x") for line in found.plan)
    assert nf.explain(layer.eval(), x).rule == "standard"


def given(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> dict[str, Tensor]:
    c = shape[1]
    made = torch.Generator().manual_seed(3)
    return {
        "x": data(shape, dtype, mean=mean),
        "weight": torch.randn(c, generator=made, dtype=F64).mul(0.3).add(1).to(DEVICE, dtype),
        "bias": torch.randn(c, generator=made, dtype=F64).to(DEVICE, dtype),
        "dy": torch.randn(shape, generator=made, dtype=F64).to(DEVICE, dtype),
    }


def ran(call: Any, t: dict[str, Tensor]) -> list[Tensor]:
    """y and the gradients of x, weight and bias."""
    leaves = [t[n].detach().clone().requires_grad_() for n in ("x", "weight", "bias")]
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, t["dy"])]


@pytest.mark.triton_surface
@pytest.mark.parametrize(("dtype", "form"), [(torch.float32, "contiguous"), (torch.bfloat16, "channels_last")])
@fused
def test_renorm_without_correction_is_batch_norm_bit_for_bit(name: str, dtype: torch.dtype, form: str) -> None:
    t = {n: layout(v, form) if v.dim() == 4 else v for n, v in given((3, 6, 4, 4), dtype, mean=2.0).items()}
    ours, theirs = (torch.zeros(6, device=DEVICE) for _ in range(2))
    spread = torch.full((6,), 3.0, device=DEVICE)  # of the one a deviation, of the other a variance
    call: dict[str, Any] = {"act": "silu", "backend": name}
    one = ran(lambda x, w, b: NF.batch_renorm_act(x, ours, spread.clone(), w, b, True, 0.1, r_max=1.0, d_max=0.0, **call), t)
    other = ran(lambda x, w, b: NF.batch_norm_act(x, theirs, spread.clone(), w, b, True, 0.1, **call), t)
    for what, a, b in zip(("y", "dx", "dweight", "dbias", "running_mean"), [*one, ours], [*other, theirs], strict=True):
        assert torch.equal(a, b), what


@pytest.mark.triton_surface
@fused
def test_statistics_are_read_before_they_move(name: str) -> None:
    """With momentum 1 whoever read them after the update would find r = 1 and d = 0; whoever updated twice, nothing left to see, so of
    a second call with momentum 0.5 each statistic goes half way."""
    x = data((4, 6, 5, 3), F64, mean=1.0)
    mean, deviation = (torch.full((6,), v, dtype=F64, device=DEVICE) for v in (0.5, 0.8))
    counter = torch.tensor(0, device=DEVICE)
    call = {"r_max": 100.0, "d_max": 100.0, "backend": name, "num_batches_tracked": counter}
    y = NF.batch_renorm_act(x, mean, deviation, None, None, True, 1.0, EPS, **call)
    torch.testing.assert_close(y, (x - 0.5) / 0.8)  # nothing is clamped: the running statistics normalize
    batch_mean, batch_deviation = x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + EPS).sqrt()
    torch.testing.assert_close(mean, batch_mean)
    torch.testing.assert_close(deviation, batch_deviation)
    other = 3 * x - 1
    y = NF.batch_renorm_act(other, mean, deviation, None, None, True, 0.5, EPS, **call)
    torch.testing.assert_close(y, (other - batch_mean.view(1, -1, 1, 1)) / batch_deviation.view(1, -1, 1, 1))
    torch.testing.assert_close(mean, (batch_mean + 3 * batch_mean - 1) / 2)
    torch.testing.assert_close(deviation, (batch_deviation + (other.var((0, 2, 3), correction=0) + EPS).sqrt()) / 2)
    assert int(counter) == 2


@pytest.mark.triton_surface
@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@pytest.mark.parametrize("member", ["batch renorm", "mean only scaled"])
@fused
def test_large_mean(member: str, form: str, name: str) -> None:
    """A mean of 3000 standard deviations costs what its own rounding costs, u*3000 = 1.8e-4, times a few; sums of x, or of x^2, that are
    not about a centre near the mean would lose 3000 times more."""
    one = BY_NAME[member]
    t = given((4, 6, 5, 3), torch.float32, mean=3000.0)
    x, dy = (layout(t[n], form) for n in ("x", "dy"))
    learned = {n: v.to(DEVICE, torch.float32).requires_grad_() for n, v in one.learned(6).items()}
    kept = {n: v.to(DEVICE, torch.float32) for n, v in one.kept(6).items()}
    kept["running_mean"] = (3000 * torch.linspace(-1, 1, 6) + 0.3).to(DEVICE)
    wide = {n: v.detach().double().requires_grad_(v.requires_grad) for n, v in (learned | kept).items()}
    x64, leaf = x.double().requires_grad_(), x.detach().requires_grad_()
    z = one.oracle(x64, wide, True)
    wanted = torch.autograd.grad(z, [x64, *(wide[n] for n in learned)], dy.double())
    y = one.call(leaf, learned | kept, True, backend=name)
    found = torch.autograd.grad(y, [leaf, *learned.values()], dy)
    unit = 3000 * 2**-24
    torch.testing.assert_close(y.double(), z.detach(), rtol=0, atol=4 * unit)
    for what, got, want in zip(("x", *learned), found, wanted, strict=True):
        # a parameter's gradient is a sum of 60 terms
        torch.testing.assert_close(
            got.double(), want, rtol=0, atol=(8 if what == "x" else 8 * 60) * unit, msg=lambda text, what=what: f"d{what}: {text}"
        )


@pytest.mark.skipif(INTERPRETED, reason="kernels that are interpreted are not traced")
@pytest.mark.parametrize("rule", LAYERS)
@fused
def test_operator(rule: str, name: str) -> None:
    x, r = (torch.randn(3, 4, 3, 2, device=DEVICE) for _ in range(2))
    w, b, running_mean, running = (torch.rand(4, device=DEVICE) + 0.5 for _ in range(4))
    static = ("channel", rule, 1, True, 1e-5, None, "silu", 0.0, 0.0, "pre_act", name)
    bounds = {"r_max": torch.tensor(1.3, device=DEVICE), "d_max": torch.tensor(0.5, device=DEVICE)} if rule == "renorm" else {}
    arguments = (x, r, w, b, None, None, running_mean, running, torch.tensor(0, device=DEVICE), *static)
    opcheck(torch.ops.normfused.norm_act.default, arguments, bounds)
    _, mean, rstd, _ = torch.ops.normfused.norm_act(*arguments, **bounds)
    assert rstd.shape == ((3, 4) if rule == "renorm" else (4,))
    gradient = (torch.randn_like(x), None, x, r, w, b, None, None, mean, rstd, *static, True, True, True)
    opcheck(torch.ops.normfused.norm_act_backward.default, gradient)


@pytest.mark.skipif(INTERPRETED, reason="kernels that are interpreted are not traced")
@fused
def test_a_schedule_compiles_once(name: str) -> None:
    """The bounds are tensors, so that the steps of their schedule are one graph, of the operator."""
    torch._dynamo.reset()
    steps = {"warmup_steps": 1, "r_max_step": 4, "d_max_step": 3}
    ours, theirs = (nf.BatchRenormAct2d(4, device=DEVICE, **steps, act="relu", backend=name) for _ in range(2))
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(ours, fullgraph=True, backend=count)
    for step in range(4):
        x = data((3, 4, 3, 2), torch.float32, seed=step, mean=1.0)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        for layer, leaf in zip((compiled, theirs), leaves, strict=True):
            layer(leaf).square().sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1
