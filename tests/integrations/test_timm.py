"""timm: its two families of models, its registries, and that a patch leaves nothing behind; with timm and with a stand-in for it."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn

import normfused as nf
from normfused.norms.base import NormActMixin
from tests.integrations import stand_ins
from tests.support.packages import package

FAMILIES = {"stand-in": ("separate", "in_one"), "timm": ("resnet18", "mobilenetv2_035")}


@pytest.fixture(params=list(FAMILIES))
def timm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = stand_ins.timm(monkeypatch) if request.param == "stand-in" else package("timm")
    found.families = FAMILIES[request.param]
    return found


def own(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, NormActMixin)]


def state() -> list[Any]:
    norms, acts = sys.modules["timm.layers.create_norm"], sys.modules["timm.layers.create_norm_act"]
    registries = [norms._NORM_MAP, acts._NORM_ACT_MAP, acts._NORM_ACT_REQUIRES_ARG]  # type: ignore[attr-defined]
    return [
        [(id(r), list(r.items()) if isinstance(r, dict) else set(r)) for r in registries],
        sys.modules["timm.models._factory"].model_entrypoint,  # type: ignore[attr-defined]
        sys.modules["timm"].create_model,  # type: ignore[attr-defined]
    ]


def same(model: nn.Module, plain: nn.Module) -> None:
    x = torch.randn(2, 3, 32, 32)
    model.load_state_dict(plain.state_dict())
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), plain.train(training)(x), rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_patched_fuses_what_is_created_and_restores_all(timm: Any) -> None:
    create_model = timm.create_model  # imported by name, before
    with nf.integrations.timm.patched():
        kept = nf.integrations.timm.norm_layer("bn")
    assert timm.layers.get_norm_act_layer(kept, nn.ReLU)(4).act is not None  # serves on
    for name in timm.families:
        plain = create_model(name)
        before = state()
        with nf.integrations.timm.patched(exclude=["conv1"]) as reports:
            model = create_model(name)
            assert timm.layers.get_norm_layer("normfused_gn")(64, num_groups=2).num_groups == 2
        assert len(reports) == 1 and reports[0].model is model and reports[0].fused
        assert len(own(model)) == len(reports[0].rows) == len(own(copy.deepcopy(model)))
        same(model, plain)
        assert state() == before
        assert own(create_model(name)) == []
        with pytest.raises(ZeroDivisionError), nf.integrations.timm.patched():
            raise ZeroDivisionError
        assert state() == before
    with pytest.raises(KeyError):
        timm.layers.get_norm_layer("normfused_gn")
    with pytest.raises(TypeError, match="patched: options must be those of fuse_norms for a model in place, got inplace"):
        nf.integrations.timm.patched(inplace=False).__enter__()


def test_norm_layer_serves_both_families(timm: Any) -> None:
    separate, in_one = timm.families
    for name in timm.families:
        model = timm.create_model(name, norm_layer=nf.integrations.timm.norm_layer("bn"))
        plain = timm.create_model(name)
        norms = own(model)
        assert norms and all(type(m) is nf.BatchNormAct2d for m in norms)
        assert any(m.act is not None for m in norms) is (name == in_one)
        same(model, plain)
        if name == separate:
            assert nf.fuse_norms(model).fused
            same(model, plain)
        other = timm.create_model(name, norm_layer=nf.integrations.timm.norm_layer("gn", group_size=4))
        assert {m.num_channels // m.num_groups for m in own(other)} == {4}
    model = timm.create_model(separate, norm_layer=nf.integrations.timm.norm_layer(nf.SwitchNormAct2d))
    assert {type(m) for m in own(model)} == {nf.SwitchNormAct2d}


def test_an_activation_of_ones_own(timm: Any) -> None:
    separate, in_one = timm.families
    layer = nf.integrations.timm.norm_act_layer("bn", ("leaky_relu", {"negative_slope": 0.2}))
    acts = {str(nf.activations.from_module(m.act)) if m.act else "" for m in own(timm.create_model(in_one, norm_layer=layer))}
    assert acts == {"leaky_relu(negative_slope=0.2)", ""}, acts
    with pytest.raises(TypeError, match="got a call for a norm alone, after which it would apply a second"):
        timm.create_model(separate, norm_layer=layer)
    create = timm.layers.create_norm_act_layer
    assert type(create(layer, 8, act_layer=nn.ReLU).act) is nn.LeakyReLU
    assert create(layer, 8).act is None and create(layer, 8, nn.ReLU, apply_act=False).act is None
    assert layer(8, apply_act=True).act.negative_slope == 0.2
    plain = nf.integrations.timm.norm_layer("ln2d", eps=1e-3)
    assert type(create(plain, 8, "silu").act) is nn.SiLU and create(plain, 8, "silu").eps == 1e-3
    assert plain(8, device="meta").act is None and plain(8, device="meta").weight.is_meta
    with pytest.raises(TypeError, match="a norm with an activation must be told which"):
        plain(8, inplace=True)
    shared = nf.integrations.timm.norm_act_layer("bn", nn.PReLU(8))
    assert shared(8, apply_act=True).act is not shared(8, apply_act=True).act
    with pytest.raises(ValueError, match="norm_layer: kind must be one of bn, .* got 'batch'"):
        nf.integrations.timm.norm_layer("batch")
    with pytest.raises(ValueError, match="unknown activation 'rely'"):
        nf.integrations.timm.norm_act_layer("bn", "rely")


def test_a_layer_between_norm_and_activation_is_composed(timm: Any) -> None:
    layer = timm.layers.create_norm_act_layer(nf.integrations.timm.norm_layer("bn"), 4, nn.ReLU, drop_layer=lambda: nn.Dropout(0.5))
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer.eval()(x), nn.BatchNorm2d(4).eval()(x).relu())
    torch.manual_seed(0)
    assert int((layer.train()(x) == 0).sum()) > 60 and list(layer.state_dict()) == list(nn.BatchNorm2d(4).state_dict())


def test_another_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.timm(monkeypatch)
    del sys.modules["timm.layers.create_norm_act"]._NORM_ACT_REQUIRES_ARG  # type: ignore[attr-defined]
    with pytest.raises(
        RuntimeError, match=r"must have _NORM_ACT_REQUIRES_ARG, got timm 1.0 \(stand-in\) without it; .*fuse_norms\(model\) needs none"
    ):
        nf.integrations.timm.norm_layer("bn")


def test_features_by_fx() -> None:
    """timm takes its models apart by torch.fx too: our layers are leaves to it."""
    timm = package("timm")
    features = package("timm.models._features_fx")
    plain = timm.create_model("mobilenetv2_035").eval()
    with nf.integrations.timm.patched():
        model = timm.create_model("mobilenetv2_035").eval()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 32, 32)
    wanted = features.FeatureGraphNet(plain, (1, 3))(x)
    for got, want in zip(features.FeatureGraphNet(model, (1, 3))(x), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
