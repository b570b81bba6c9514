"""A newcomer's first day, minute by minute, on a CPU: every line that they write, and what they must see.

Installing (minute 0) is in tests/build/test_install.py, ``python -m normfused bench`` (minute 15) in tests/benchmark/test_command.py.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import swa_utils

import normfused as nf
from normfused.__main__ import main
from tests.support.packages import package


class Block(nn.Module):
    """A residual block as torchvision writes it, with one ReLU for both places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.SiLU())
        self.block, self.head = Block(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.block(self.stem(x)).mean((2, 3)))
        return scores


NETWORKS: dict[str, tuple[Callable[[], Any], tuple[int, int, int]]] = {
    "their own": (Net, (3, 3, 1)),
    "timm resnet50": (lambda: package("timm").create_model("resnet50"), (53, 49, 16)),
}


def image(batch: int = 4, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def pair() -> tuple[Net, Net]:
    plain = Net()
    fused = copy.deepcopy(plain)
    nf.fuse_norms(fused)
    return fused, plain


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_minute_2_the_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "ok" in out and "torch" in out and "FAILED" not in out


@pytest.mark.parametrize("name", NETWORKS)
def test_minutes_3_to_5_first_use(name: str) -> None:
    """Three lines, the checkpoint that exists, the same numbers, and the way back."""
    make, counted = NETWORKS[name]
    model = make()
    checkpoint = copy.deepcopy(model.state_dict())
    plain, x = copy.deepcopy(model).eval(), image(2, 32)
    report = nf.fuse_norms(model)
    assert (len(report.rows), len(report.fused), sum(r.residual for r in report.rows)) == counted
    assert str(report).endswith(
        f"{counted[0]} of {counted[0]} norms converted, {counted[1]} with their activation, {counted[2]} of these with the residual add"
    )
    model(x)
    model.load_state_dict(checkpoint)
    torch.testing.assert_close(model.eval()(x), plain(x), rtol=1e-4, atol=1e-5)
    nf.unfuse_norms(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    torch.testing.assert_close(model(x), plain(x))


def test_minute_10_mixed_precision_and_channels_last() -> None:
    fused, plain = pair()
    losses = []
    for model in (fused, plain):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters())
        with torch.autocast("cpu", torch.bfloat16):
            y = model.block(model.stem(image().to(memory_format=torch.channels_last)))
            loss = F.cross_entropy(model.head(y.mean((2, 3))), torch.arange(4))
        assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=2**-7)  # bfloat16 has 8 bits
    assert all(bool(g.isfinite().all()) for g in gradients(fused)) and len(gradients(fused)) == len(gradients(plain))


def test_minute_10_gradient_penalty() -> None:
    """The penalty's gradient reaches the weights; it is not zero, and it is torch's."""
    fused, plain = pair()
    for model in (fused.double(), plain.double()):
        x = image().double().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (slope.flatten(1).norm(dim=1) - 1).square().mean().backward()
    assert all(bool(g.abs().sum() > 0) for g in gradients(plain)[:1])
    for got, wanted in zip(gradients(fused), gradients(plain), strict=True):
        torch.testing.assert_close(got, wanted)


def test_minute_10_averaged_weights() -> None:
    """EMA or SWA and the statistics of the averaged network, for which torch sets momentum to None."""
    states = []
    for model in pair():
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
        model(image()).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        average.update_parameters(model)
        swa_utils.update_bn([image(), image(3)], average)
        states.append(average.state_dict())
    assert list(states[0]) == list(states[1])
    for got, wanted in zip(states[0].values(), states[1].values(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_minute_10_distributed_and_compiled() -> None:
    """Two forwards before one backward, as a GAN's critic has; the whole graph under torch.compile."""
    fused, plain = pair()
    if distributed.is_available() and not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        try:
            model = DistributedDataParallel(copy.deepcopy(fused))
            (model(image()).mean() - model(image(3)).mean()).backward()
            assert gradients(model) and all(bool(g.isfinite().all()) for g in gradients(model))
        finally:
            distributed.destroy_process_group()
    compiled: Any = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for model in (compiled, plain):
        model(image()).square().sum().backward()
    for got, wanted in zip(gradients(fused), gradients(plain), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_minute_10_lightnings_sync_batchnorm() -> None:
    """A clear error with the one-line fix, not a wrong model; Lightning's plugin where it is installed, else what it calls."""
    convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
    try:
        from lightning.pytorch.plugins import TorchSyncBatchNorm
    except Exception:
        pass
    else:
        convert = TorchSyncBatchNorm().apply
    fused, plain = pair()
    message = r"silently drop its fused activation silu; use .*normfused.convert_sync_batchnorm\(model\) instead"
    with pytest.raises(RuntimeError, match=message):
        convert(fused)
    fixed = nf.convert_sync_batchnorm(pair()[0])
    fixed.load_state_dict(plain.state_dict())
    assert sum(type(m) is nf.SyncBatchNormAct for m in fixed.modules()) == 3
    torch.testing.assert_close(fixed(image()), plain(image()), rtol=1e-4, atol=1e-5)


def test_day_2_export_and_a_checkpoint_for_somebody_without_normfused() -> None:
    fused, plain = pair()
    fused(image())
    program = torch.export.export(fused.eval(), (image(),))
    torch.testing.assert_close(program.module()(image()), fused(image()), rtol=1e-4, atol=1e-5)
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(plain.eval()(image()), fused(image()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unfused", [False, True])
def test_day_2_onnx(unfused: bool) -> None:
    package("onnxscript")
    fused, _ = pair()
    if unfused:
        nf.unfuse_norms(fused)
    program: Any = torch.onnx.export(fused.eval(), (image(),), dynamo=True, verbose=False)
    assert not [n.domain for n in program.model.graph if n.domain not in ("", "pkg.onnxscript.torch_lib")]
