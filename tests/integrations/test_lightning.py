"""Lightning: what `sync_batchnorm=True` does to fused norms, the plugin in its place, the callback; with it and with a stand-in for it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfused as nf
from tests.integrations import stand_ins
from tests.support.packages import package

OURS = "normfused.integrations.lightning"


@pytest.fixture
def standing_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The integration over the stand-in, whether the real one was imported or not."""
    before = sys.modules.pop(OURS, None)
    vars(nf.integrations).pop("lightning", None)
    stand_ins.lightning(monkeypatch)
    yield importlib.import_module(OURS)
    del sys.modules[OURS], nf.integrations.lightning
    if before is not None:
        sys.modules[OURS] = nf.integrations.lightning = before  # type: ignore[assignment]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nf.BatchNormAct2d(4, act="silu"))


def kinds(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def test_sync_batchnorm_says_what_to_write_instead(standing_in: Any) -> None:
    fuse = standing_in.FuseNorms(verbose=False)
    with pytest.raises(RuntimeError) as error:
        stand_ins.Trainer(sync_batchnorm=True, callbacks=[fuse]).fit(network(), lambda model: None)
    assert str(error.value) == (
        "replacing '1', a BatchNormAct2d, by a SyncBatchNorm would silently drop its fused activation relu; use"
        " Trainer(plugins=[normfused.integrations.lightning.NormFusedSyncBatchNorm()]) in place of sync_batchnorm=True, or"
        " normfused.convert_sync_batchnorm(model) instead, or normfused.unfuse_norms(model) first (with normfused.allow_lossy_conversion():"
        " if it shall be dropped)"
    )
    with pytest.raises(ValueError, match="provided a `NormFusedSyncBatchNorm` plugin"):
        stand_ins.Trainer(sync_batchnorm=True, plugins=[standing_in.NormFusedSyncBatchNorm()])


@pytest.mark.parametrize("fused", [True, False])
def test_the_plugin_synchronizes_and_gives_back(standing_in: Any, fused: bool) -> None:
    model = network()
    if fused:
        nf.fuse_norms(model)
    before, attributes = kinds(model), [sorted(m.__dict__) for m in model.modules()]
    seen: list[list[type]] = []

    def steps(model: nn.Module) -> None:
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        seen.append(kinds(model))

    stand_ins.Trainer(plugins=[standing_in.NormFusedSyncBatchNorm(lambda: None)]).fit(model, steps)
    assert seen[0].count(nf.SyncBatchNormAct) == 2 and kinds(model) == before
    assert [sorted(m.__dict__) for m in model.modules()] == attributes
    assert int(model[1].num_batches_tracked) == int(model[4].num_batches_tracked) == 1  # what was learned stays
    x = torch.randn(2, 3, 8, 8)
    wanted = model.eval()(x)
    if fused:
        nf.unfuse_norms(model)
        assert type(model[1]) is nn.BatchNorm2d
    torch.testing.assert_close(model(x), wanted)


def test_the_callback_reports(standing_in: Any, capsys: pytest.CaptureFixture[str]) -> None:
    callback = standing_in.FuseNorms(exclude=["4"])
    assert callback.report is None and isinstance(callback, stand_ins.Callback)
    model = network()
    stand_ins.Trainer(callbacks=[callback]).fit(model, lambda model: None)
    assert [r.name for r in callback.report.fused] == ["1"] and callback.report.model is model
    out = capsys.readouterr().out
    assert out.count("fuse_norms(Sequential): 1 of 2 norms converted, 1 with their activation") == 1
    with pytest.raises(TypeError, match="FuseNorms: options must be those of fuse_norms for a model in place, got dry_run"):
        standing_in.FuseNorms(dry_run=True)


# ---------------------------------------------------------------------------------------------------- the package itself
@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request: pytest.FixtureRequest) -> Any:
    """Either package; the integration serves all that are imported when it is."""
    found = [package(name) for name in ("lightning.pytorch", "pytorch_lightning") if _has(name)]
    return next((f for f in found if f.__name__ == request.param), None) or package(request.param)


def _has(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def lit(pl: Any) -> Any:
    class Lit(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(network(), nn.Flatten(), nn.LazyLinear(2))
            self.net(torch.zeros(2, 3, 8, 8))
            self.losses: list[float] = []
            self.in_training: list[type] = []

        def training_step(self, batch: Any, _: int) -> Tensor:
            self.in_training = kinds(self.net)
            loss: Tensor = self.net(batch[0].to(self.net[2].weight.dtype)).square().mean()
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05)

        def train_dataloader(self) -> Any:
            images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), 4)

    torch.manual_seed(0)
    return Lit()


def trainer(pl: Any, path: Path, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, default_root_dir=path, **quiet, **options)


def test_trainer(pl: Any, tmp_path: Path) -> None:
    """The error, the plugin in its place (DDP of one process), and that Lightning refuses both."""
    ours = nf.integrations.lightning
    model = lit(pl)
    nf.fuse_norms(model)
    with pytest.raises(RuntimeError, match=r"use Trainer\(plugins=\[normfused.integrations.lightning.NormFusedSyncBatchNorm\(\)\]\)"):
        trainer(pl, tmp_path, strategy="ddp", sync_batchnorm=True).fit(model)
    with pytest.raises(Exception, match="NormFusedSyncBatchNorm"):
        trainer(pl, tmp_path, strategy="ddp", sync_batchnorm=True, plugins=[ours.NormFusedSyncBatchNorm()])
    model = lit(pl)
    callback = ours.FuseNorms(verbose=False)
    before = kinds(model.net)
    trainer(pl, tmp_path, strategy="ddp", plugins=[ours.NormFusedSyncBatchNorm()], callbacks=[callback]).fit(model)
    assert model.in_training.count(nf.SyncBatchNormAct) == 2 and len(callback.report.fused) == 1
    nf.unfuse_norms(model)
    assert kinds(model.net) == before


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-true", "64-true"])
def test_precision_plugins(precision: str, tmp_path: Path) -> None:
    pl: Any = package("lightning.pytorch")
    losses = []
    for callbacks in ([nf.integrations.lightning.FuseNorms(verbose=False)], []):
        model = lit(pl)
        trainer(pl, tmp_path, precision=precision, callbacks=callbacks).fit(model)
        losses.append(model.losses)
    # of the rounding of the type that the convolutions and the loss are in, after one step of training
    tolerance = {"32-true": 1e-5, "bf16-mixed": 4e-2, "16-true": 5e-3, "64-true": 1e-6}[precision]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=tolerance)


def test_checkpoints(tmp_path: Path) -> None:
    """Saved with plain norms, resumed with fused ones."""
    pl: Any = package("lightning.pytorch")
    first = trainer(pl, tmp_path)
    first.fit(lit(pl))
    first.save_checkpoint(tmp_path / "plain.ckpt")
    model = lit(pl)
    longer = trainer(pl, tmp_path, callbacks=[nf.integrations.lightning.FuseNorms(verbose=False)])
    longer.fit_loop.max_epochs = 2
    longer.fit(model, ckpt_path=tmp_path / "plain.ckpt")
    assert int(model.net[0][1].num_batches_tracked) == 1 + 4 and type(model.net[0][1]) is nf.BatchNormAct2d
