"""What `normfused.diagnostics` reports: against plain counts and variances, and the published figures of deep networks."""

from __future__ import annotations

import builtins
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfused as nf
from normfused.diagnostics import LayerReport, diagnose, observe


def _plainly(z: Tensor, threshold: Tensor | float = 0.0) -> tuple[float, ...]:
    """(dead, linear, variance, mean square) of pre-activations (N, C, *) by their definitions, in float64."""
    units = z.double().movedim(1, 0).flatten(1)
    apart = units - (threshold.double().view(-1, 1) if isinstance(threshold, Tensor) else threshold)
    dead, linear = (apart <= 0).all(1).double().mean(), (apart > 0).all(1).double().mean()
    return float(dead), float(linear), float(units.var(1, correction=0).mean()), float(units.square().mean())


def _agrees(layer: LayerReport, z: Tensor, threshold: Tensor | float = 0.0) -> None:
    dead, linear, variance, mean_square = _plainly(z, threshold)
    assert (layer.dead, layer.linear) == (dead, linear)
    assert layer.mixed == pytest.approx(1 - dead - linear)
    assert (layer.variance, layer.mean_square) == pytest.approx((variance, mean_square), rel=1e-5)


LAYERS = {
    "batch": lambda: nf.BatchNormAct2d(6, act="relu"),
    "group, residual": lambda: nf.GroupNormAct(3, 6, act="leaky_relu"),
    "frn": lambda: nf.FilterResponseNorm2d(6, tlu=True),
    "post_act": lambda: nf.InstanceNormAct2d(6, affine=True, act="relu", residual_mode="post_act"),
    "input bias": lambda: nf.InputBias(6, act="relu"),
    "own": lambda: nf.define_norm(lambda mean, var, weight, bias: (weight, bias), {"weight": -1.0, "bias": 0.0})(6, act="relu"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_normfused(name: str) -> None:
    """z of the fused layer is the same layer's output without activation, over two batches of different size; y is as before."""
    torch.manual_seed(0)
    layer: Any = LAYERS[name]()
    bias = getattr(layer, "bias", None)
    if bias is not None:
        with torch.no_grad():
            bias.copy_(torch.linspace(-6, 6, 6))
            if name == "frn":
                layer.tau.copy_(torch.linspace(-2, 2, 6))
    layer.eval()
    batches = [torch.randn(n, 6, 4, 3) + 0.5 for n in (5, 3)]
    residuals = [torch.randn_like(x) for x in batches]
    takes_residual = name in ("group, residual", "post_act")
    want = [layer(x, r) if takes_residual else layer(x) for x, r in zip(batches, residuals, strict=True)]
    with observe(layer) as found:
        got = [layer(x, r) if takes_residual else layer(x) for x, r in zip(batches, residuals, strict=True)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert not any(m._forward_pre_hooks for m in layer.modules())
    threshold: Tensor | float = 0.0
    if name == "frn":
        threshold, layer.tau = layer.tau.detach(), None
    else:
        layer.act = None
    if name == "input bias":
        z = torch.cat(batches)  # its activation comes first
    else:
        z = torch.cat([layer(x, r) if name == "group, residual" else layer(x) for x, r in zip(batches, residuals, strict=True)])
    report = found.report()
    assert [row.name for row in report.layers] == ["FilterResponseNorm2d" if name == "frn" else "act"]
    _agrees(report.layers[0], z.detach(), threshold)
    assert report.input_variance == pytest.approx(_plainly(torch.cat(batches))[2], rel=1e-5)


def test_plain_modules_shared_modules_and_rows() -> None:
    """Convolutions, features and rows; a ReLU that runs twice is two layers; smooth activations have variances only."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.fc, self.silu = nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.SiLU()
            self.rows = nf.LayerNormAct(5, act="relu")

        def forward(self, x: Tensor) -> Tensor:
            h = self.relu(self.conv(x))
            z: Tensor = self.rows(self.silu(self.relu(self.fc(h.mean((2, 3)))))[:, None].expand(-1, 4, -1) * torch.arange(4.0).view(4, 1))
            return z

    torch.manual_seed(0)
    net, x = Net(), torch.randn(7, 3, 6, 6)
    with torch.no_grad():
        net.conv.bias.copy_(torch.tensor([-9.0, 9, 0, 0, 0, 0]))  # type: ignore[union-attr]
        net.rows.bias.copy_(torch.tensor([-9.0, 9, 9, 0, 0]))
    report = diagnose(net, [(x, "labels")], outputs=["conv"])
    assert [row.name for row in report.layers] == ["conv", "relu", "relu#2", "silu", "rows.act"]
    z = net.conv(x).detach()
    _agrees(report["relu"], z)
    assert (report["relu"].dead, report["relu"].linear) == (1 / 6, 1 / 6)
    _agrees(report["relu#2"], net.fc(z.relu().mean((2, 3))).detach())
    assert report["silu"].dead is None and report["silu"].variance > 0
    net.rows.act, act = None, net.rows.act
    _agrees(report["rows.act"], net(x).detach().movedim(-1, 1))
    assert report["rows.act"].units == 5 and isinstance(act, nn.ReLU)
    assert report["conv"].variance == report["relu"].variance and report["conv"].kind == "output of Conv2d"
    with pytest.raises(KeyError, match=r"no layer 'x'; known: conv, relu"):
        report["x"]


def test_ties_and_nan() -> None:
    """Zero is on the negative side of a ReLU, whose derivative there is 0; what is not a number is neither dead nor linear."""
    z = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 2.0, torch.nan]])
    layer = diagnose(nn.Sequential(nn.ReLU()), z).layers[0]
    assert (layer.dead, layer.linear, layer.mixed) == (0.25, 0.25, 0.5)


def test_large_means_over_many_batches() -> None:
    """Deviations are summed about each batch's own mean and merged: the variance survives a mean of 10^4 in float32."""
    torch.manual_seed(0)
    batches = [torch.randn(64, 3, 5) + 1e4 for _ in range(20)]
    found = diagnose(nn.Sequential(nn.ReLU()), batches).layers[0]
    assert found.variance == pytest.approx(_plainly(torch.cat(batches))[2], rel=1e-4)
    half = diagnose(nn.Sequential(nn.ReLU()), [torch.randn(8, 3, 5).bfloat16()]).layers[0]
    assert 0.5 < half.variance < 1.5


def test_errors_and_user_hooks() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ValueError, match="nothing was collected"):
        observe(net).report()
    with pytest.raises(ValueError, match=r"outputs must name modules of the model, got \['2'\]"):
        observe(net, outputs=["2"])
    assert [row.name for row in diagnose(net, torch.randn(3, 4), outputs="0").layers] == ["0", "1"]  # one name stands for itself
    with pytest.raises(ValueError, match="must have the same units in every batch, got 3 after 4"):
        diagnose(nn.Sequential(nn.ReLU()), [torch.randn(2, 4), torch.randn(2, 3)])
    seen: list[int] = []
    net[1].register_forward_hook(lambda *_: seen.append(1))
    assert [row.name for row in diagnose(net, torch.randn(3, 4)).layers] == ["1"] and seen == [1]


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.SiLU())
    report = diagnose(net, torch.randn(50, 4))
    lines = str(report).splitlines()
    assert len(lines) == 4 and lines[0].split()[:3] == ["layer", "activation", "units"] and lines[2].split()[:3] == ["1", "relu", "8"]
    real = builtins.__import__

    def without(*names: str) -> None:
        def limited(name: str, *rest: Any, **more: Any) -> Any:
            if name.split(".")[0] in names:
                raise ImportError(f"no {name}")
            return real(name, *rest, **more)

        monkeypatch.setattr(builtins, "__import__", limited)

    without("rich", "matplotlib")
    report.print()
    assert capsys.readouterr().out == f"{report}\n"
    with pytest.raises(ImportError, match=r"Report\.plot: drawing needs matplotlib: pip install matplotlib"):
        report.plot()
    monkeypatch.setattr(builtins, "__import__", real)
    pytest.importorskip("rich")
    report.print()
    assert "relu" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5000


# ------------------------------------------------------------------------------------ figures of deep networks
def _deep(depth: int, bias: bool, width: int = 512) -> nn.Sequential:
    net = nn.Sequential()
    for _ in range(depth):
        if bias:
            net.append(nf.InputBias(width))
        linear = nn.Linear(width, width, bias=False)
        nn.init.kaiming_normal_(linear.weight)
        net.append(linear).append(nn.ReLU())
    return net


def test_units_of_a_deep_plain_network() -> None:
    """Width 512, 2048 inputs uniform in [0, 1], He's initialization. One seed scatters by 0.02 to 0.04; the mean of three is held to 0.06.

    Layer 10: .14 dead, .15 linear, .71 mixed; layer 20: .22, .22, .56; layer 50: .35, .34, .31. With input biases all are mixed.
    """
    published = {10: (0.14, 0.15, 0.71), 20: (0.22, 0.22, 0.56), 50: (0.35, 0.34, 0.31)}
    reports = []
    for seed in range(3):
        torch.manual_seed(seed)
        reports.append(diagnose(_deep(50, False), torch.rand(2048, 512)))
    for depth, values in published.items():
        rows = [report.layers[depth - 1] for report in reports]
        for name, value in zip(("dead", "linear", "mixed"), values, strict=True):
            assert statistics.mean(getattr(row, name) for row in rows) == pytest.approx(value, abs=0.06), (depth, name)
    net, x = _deep(50, True), torch.rand(2048, 512)
    with torch.no_grad():
        net(x)
    assert all(row.mixed == 1 for row in diagnose(net.eval(), x).layers)


class _Block(nn.Module):
    """x + F(x), or the rescaled sum, with F(x) = W relu(W relu(x)), which keeps the mean square of He's initialization."""

    def __init__(self, index: int, kind: str, width: int = 512) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.residual = None if kind == "plain" else nf.RescaledResidual(index, 16, act=None)
        if kind == "rescaled":
            nf.rescale_init_(self.layers, index, 16)
        else:
            for layer in self.layers:
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.layers[1](self.layers[0](x.relu()).relu())
        y: Tensor = x + branch if self.residual is None else self.residual(x, branch)
        return y


@pytest.mark.parametrize(("kind", "published", "factor"), [("plain", 2.0**16, 1.5), ("he", 1.33, 1.1), ("rescaled", 1.0, 1.1)])
def test_variance_after_sixteen_blocks(kind: str, published: float, factor: float) -> None:
    """Over inputs and weights: 2^16 plain; 1.33 with rescaled residuals and He's initialization, 1.0 with RescaleNet's.

    The first is a product of 16 factors that scatter by a tenth each with width 512, some 0.4 in all; the mean of six is held to 1.5.
    """
    found = []
    for seed in range(6):
        torch.manual_seed(seed)
        net = nn.Sequential(*(_Block(k, kind) for k in range(16)))
        report = diagnose(net, torch.randn(64, 512), outputs=lambda name, m: isinstance(m, _Block))
        assert len(report.layers) == 16
        last = report.layers[-1].relative_mean_square
        assert last is not None
        found.append(last)
    assert published / factor < statistics.mean(found) < published * factor
