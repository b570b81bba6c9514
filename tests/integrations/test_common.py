"""What all integrations promise: nothing is imported before it is used, and one sentence where a package is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import normfused as nf
from normfused.integrations import _common

PACKAGES = ("timm", "mmcv", "mmengine", "detectron2", "lightning", "pytorch_lightning", "segmentation_models_pytorch", "torchvision")


def test_importing_normfused_imports_none_of_them() -> None:
    code = (
        "import sys, normfused, normfused.integrations.timm, normfused.integrations.mmcv, normfused.integrations.detectron2\n"
        "import normfused.integrations.segmentation_models\n"
        f"print([p for p in {PACKAGES} if p in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_names() -> None:
    assert {"timm", "mmcv", "detectron2", "lightning", "segmentation_models"} <= set(dir(nf.integrations))
    with pytest.raises(AttributeError, match="name must be one of .*timm, got 'keras'"):
        _ = nf.integrations.keras
    with pytest.raises(ImportError, match=r"normfused.integrations: no_such_package must be importable \(pip install it\), got: No module"):
        _common.required("no_such_package", "it")


@pytest.mark.parametrize("kind", _common.KINDS)
def test_every_kind(kind: str) -> None:
    x = torch.randn(2, 4, 5, 4)
    options = {"group_size": 2} if kind == "gn" else {}
    layer = _common.make(kind, 4, "silu", **options)
    assert layer(x).shape == x.shape and isinstance(layer.act, nn.SiLU)
    plain = _common.make(kind, 4, **options).eval()
    plain.load_state_dict(layer.state_dict(), strict=kind != "frn")
    if kind != "frn":  # which has its threshold then
        torch.testing.assert_close(layer.eval()(x), nn.functional.silu(plain(x)))


def test_a_class_of_torchs_as_activation() -> None:
    layer = nf.BatchNormAct2d(4, act=nn.LeakyReLU)
    assert type(layer.act) is nn.LeakyReLU and "act=leaky_relu" in repr(layer)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(nf.functional.group_norm_act(x, 2, act=nn.SiLU), nn.functional.silu(nn.functional.group_norm(x, 2)))


def test_layers_that_were_built_as_normfuseds_take_over_what_follows_too() -> None:
    model = nn.Sequential(nf.GroupNormAct(2, 4, backend="torch"), nn.SiLU(), nf.BatchNormAct2d(4, memory_efficient=True), nn.ReLU())
    x = torch.randn(2, 4, 3, 3)
    wanted = model(x)
    assert [(r.name, r.act) for r in nf.fuse_norms(model).fused] == [("0", "silu")]
    assert model[0].backend == "torch" and model[2].act is None
    torch.testing.assert_close(model(x), wanted)
    nf.unfuse_norms(model)
    assert model[0].act is None and model[0].backend == "torch" and type(model[1]) is nn.SiLU
    torch.testing.assert_close(model(x), wanted)
    synchronized = nn.Sequential(nf.BatchNormAct2d(4), nn.ReLU())
    nf.fuse_norms(synchronized)
    nf.unfuse_norms(nf.convert_sync_batchnorm(synchronized))
    assert type(synchronized[0]) is nf.SyncBatchNormAct and synchronized[0].act is None
