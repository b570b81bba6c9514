"""mmcv: types of norm_cfg under its conventions, and its folders; with mmengine and mmcv, and with a stand-in for them."""

from __future__ import annotations

import inspect
import pickle
import types
from typing import Any

import pytest
import torch
from torch import nn

import normfused as nf
from tests.integrations import stand_ins
from tests.support.packages import package


@pytest.fixture(params=["stand-in", "mmcv"])
def mm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "stand-in":
        return stand_ins.mmcv(monkeypatch)
    norm, utils = package("mmcv.cnn.bricks.norm"), package("mmcv.cnn.utils")
    models = package("mmengine.registry").MODELS
    return types.SimpleNamespace(
        MODELS=models, build_norm_layer=norm.build_norm_layer, infer_abbr=norm.infer_abbr, fuse_conv_bn=utils.fuse_conv_bn
    )


def test_every_type_is_built_by_mmcvs_conventions(mm: Any) -> None:
    names = nf.integrations.mmcv.register()
    assert nf.integrations.mmcv.register() == names and set(names) <= set(mm.MODELS.module_dict)
    short = {"BN": "bn", "SyncBN": "bn", "FrozenBN": "bn", "IN": "in", "GN": "gn", "LN": "ln", "RMS": "norm_layer", "FRN": "norm_layer"}
    for name in names:
        kind = name.removeprefix("NormFused").rstrip("123d")
        options = {"num_groups": 2} if kind == "GN" else {}
        called, layer = mm.build_norm_layer({"type": name, "act": "silu", "requires_grad": False, **options}, 6, postfix=1)
        assert called == short[kind] + "1" and layer.eps == 1e-5 and type(layer.act) is nn.SiLU, name
        assert not any(p.requires_grad for p in layer.parameters()) and not hasattr(layer, "_specify_ddp_gpu_num")
        assert inspect.getmodule(type(layer)).__name__.startswith("normfused.norms"), name  # type: ignore[union-attr]
        assert type(pickle.loads(pickle.dumps(layer))) is type(layer)
    x = torch.randn(2, 6, 5, 5)
    _, layer = mm.build_norm_layer({"type": "NormFusedGN", "num_groups": 3, "act": "relu"}, 6)
    torch.testing.assert_close(layer(x), nn.GroupNorm(3, 6)(x).relu())
    _, layer = mm.build_norm_layer({"type": "NormFusedLN2d", "eps": 1e-6}, 6)
    torch.testing.assert_close(layer(x), nn.LayerNorm(6, eps=1e-6)(x.movedim(1, -1)).movedim(-1, 1))
    assert layer.weight.requires_grad


def test_somebody_elses_type_stays(mm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = stand_ins.Registry()
    registry.register_module("NormFusedIN3d", module=nn.InstanceNorm3d)
    with pytest.raises(KeyError, match="NormFusedIN3d is already registered"):
        nf.integrations.mmcv.register(registry)
    assert registry.get("NormFusedIN3d") is nn.InstanceNorm3d


def test_mmcvs_folding_is_stopped(mm: Any) -> None:
    """It writes an Identity past add_module, so the function that folds has to ask."""
    nf.integrations.mmcv.register()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nf.BatchNormAct2d(4, act="relu")).eval()
    with pytest.raises(RuntimeError, match="_fuse_conv_bn of a BatchNormAct2d would silently drop its fused activation relu"):
        mm.fuse_conv_bn(model)
    x = torch.randn(2, 3, 5, 5)
    for act in (None, "relu"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nf.BatchNormAct2d(4, act=act), nn.ReLU()).eval()
        wanted = model(x)
        if act is None:
            nf.fuse_norms(model)
            with pytest.raises(RuntimeError, match="would silently drop"):
                mm.fuse_conv_bn(model)
            nf.unfuse_norms(model)
            torch.testing.assert_close(mm.fuse_conv_bn(model)(x), wanted)
        else:
            with nf.allow_lossy_conversion():
                torch.testing.assert_close(mm.fuse_conv_bn(model)(x), wanted)  # its ReLU stands behind


def test_conv_module() -> None:
    """mmcv's own block: from a config with the activation in the norm, and from one as it is, fused."""
    cnn = package("mmcv.cnn")
    nf.integrations.mmcv.register()
    x = torch.randn(2, 3, 6, 6)
    made = cnn.ConvModule(3, 8, 3, norm_cfg={"type": "NormFusedBN2d", "act": "relu"}, act_cfg=None)
    fused = cnn.ConvModule(3, 8, 3, norm_cfg={"type": "BN"})
    assert made.norm_name == fused.norm_name == "bn" and list(made.state_dict()) == list(fused.state_dict())
    made.load_state_dict(fused.state_dict())
    wanted = fused(x)
    assert len(nf.fuse_norms(fused).fused) == 1
    torch.testing.assert_close(fused(x), wanted)
    torch.testing.assert_close(made(x), wanted)
    folding = cnn.ConvModule(3, 8, 3, norm_cfg={"type": "NormFusedBN2d", "act": "relu"}, act_cfg=None, efficient_conv_bn_eval=True)
    folding(x)
    with pytest.raises(RuntimeError, match="efficient_conv_bn_eval_forward of a BatchNormAct2d would silently drop"):
        folding.eval()(x)
    mmengine = package("mmengine.model")
    with pytest.raises(RuntimeError, match="drop its fused activation ReLU"):
        mmengine.convert_sync_batchnorm(nn.Sequential(made))
