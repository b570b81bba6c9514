"""segmentation_models_pytorch: its blocks with norm and activation in one; with the package and with a stand-in for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import normfused as nf
from tests.integrations import stand_ins
from tests.support.packages import package


def test_blocks_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = stand_ins.segmentation_models(monkeypatch)
    plain = modules.Conv2dReLU(3, 8)
    with nf.integrations.segmentation_models.patched():
        model = modules.Conv2dReLU(3, 8, use_norm="inplace")
        options = {"type": "inplace", "norm": "gn", "num_groups": 2, "activation": "silu"}
        other = modules.Conv2dReLU(3, 8, use_norm=options)
        leaky = modules.Conv2dReLU(3, 8, use_norm={"type": "inplace", "activation": "leaky_relu", "activation_param": 0.2})
        alone = modules.Conv2dReLU(3, 8, use_norm={"type": "inplace", "norm": "frn", "activation": None})
        with pytest.raises(ValueError, match="patched: kind must be one of"):
            modules.Conv2dReLU(3, 8, use_norm={"type": "inplace", "norm": "batch"})
        with pytest.raises(ValueError, match="activation_param needs activation leaky_relu or elu, got 'relu'"):
            modules.Conv2dReLU(3, 8, use_norm={"type": "inplace", "activation_param": 0.2})
    assert modules.InPlaceABN is None
    with pytest.raises(RuntimeError, match="must be installed"):
        modules.Conv2dReLU(3, 8, use_norm="inplace")
    assert type(model[1].act) is nn.ReLU and type(model[2]) is nn.Identity
    assert type(other[1]) is nf.GroupNormAct and type(other[1].act) is nn.SiLU and type(other[2]) is nn.Identity
    assert leaky[1].act.negative_slope == 0.2 and alone[1].tau is not None and type(alone[2]) is nn.Identity
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(model(x), plain(x))


def test_a_version_without_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = stand_ins.segmentation_models(monkeypatch)
    del modules.InPlaceABN
    with pytest.raises(RuntimeError, match=r"must have InPlaceABN, got a version without it; normfused.fuse_norms\(model\) needs none"):
        nf.integrations.segmentation_models.patched().__enter__()


@pytest.mark.parametrize("name", ["Unet", pytest.param("Linknet", marks=pytest.mark.slow), pytest.param("FPN", marks=pytest.mark.slow)])
def test_the_package_itself(name: str) -> None:
    smp: Any = package("segmentation_models_pytorch")
    make: Any = getattr(smp, name)
    options: dict[str, Any] = {"encoder_name": "resnet18", "encoder_weights": None, "classes": 2}
    plain = make(**options)
    x = torch.randn(2, 3, 64, 64)
    with nf.integrations.segmentation_models.patched():
        model = make(**options, **({} if name == "FPN" else {"decoder_use_norm": "inplace"}))
    built = [m for m in model.decoder.modules() if isinstance(m, nf.BatchNormAct2d)]
    assert bool(built) is (name != "FPN") and list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    report = nf.fuse_norms(model)
    assert report.fused and not [r for r in report.skipped if "already" not in r.note], report
    for training in (True, False):
        torch.manual_seed(0)
        wanted = plain.train(training)(x)
        torch.manual_seed(0)
        torch.testing.assert_close(model.train(training)(x), wanted, rtol=1e-4, atol=1e-4)
