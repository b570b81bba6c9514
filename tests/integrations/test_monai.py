"""MONAI's networks with normfused's layers by name: the same outputs and keys, and the activation where it follows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import normfused as nf
from normfused.activations import Activation
from normfused.integrations import monai
from normfused.norms.base import NormActMixin


class Factory:
    """MONAI's LayerFactory: names in capitals, a function of the dimension for each."""

    def __init__(self) -> None:
        self.made: dict[str, Callable[..., Any]] = {}

    def add_factory_callable(self, name: str, func: Callable[..., Any], desc: str | None = None) -> None:
        assert name.isidentifier() and desc
        self.made[name.upper()] = func

    def add_factory_class(self, name: str, cls: type, desc: str | None = None) -> None:
        self.add_factory_callable(name, lambda x=None: cls, desc)

    def __getitem__(self, args: Any) -> Any:
        name, *rest = (args,) if isinstance(args, str) else args
        return self.made[name.upper()](*rest)


def split_args(args: Any) -> tuple[Any, Any]:
    return (args, {}) if isinstance(args, str) else args


class Mish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.mish(x)


Mish.__module__ = "monai.networks.blocks.activation"
ACTS = {"RELU": nn.ReLU, "LEAKYRELU": nn.LeakyReLU, "PRELU": nn.PReLU, "GELU": nn.GELU, "SELU": nn.SELU, "MISH": Mish}


@pytest.fixture(autouse=True)
def norm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """MONAI's factory: its own where it is installed, else a stand-in."""
    try:
        from monai.networks.layers.factories import Norm  # type: ignore[import-not-found,unused-ignore]

        return Norm
    except ImportError:
        pass
    factories, utils = ModuleType("monai.networks.layers.factories"), ModuleType("monai.networks.layers.utils")
    factories.Norm, factories.split_args = Factory(), split_args  # type: ignore[attr-defined]

    def get_act_layer(name: Any) -> nn.Module:
        known, arguments = split_args(name)
        made: nn.Module = ACTS[known.upper()](**arguments)
        return made

    utils.get_act_layer = get_act_layer  # type: ignore[attr-defined]
    for name, module in (
        ("", None),
        (".networks", None),
        (".networks.layers", None),
        (".networks.layers.factories", factories),
        (".networks.layers.utils", utils),
    ):
        monkeypatch.setitem(sys.modules, f"monai{name}", module or ModuleType(f"monai{name}"))
    return factories.Norm  # type: ignore[attr-defined]


def test_names(norm: Any) -> None:
    assert monai.register() == monai.register() == monai.NAMES
    for name in monai.NAMES:
        for dim in (1, 2, 3):
            cls = norm[name, dim]
            assert issubclass(cls, nn.Module) and getattr(nf, cls.__name__) is cls
            assert cls.__name__[-2:] not in {f"{d}d" for d in (1, 2, 3) if d != dim}
    assert norm["normfused_instance", 3] is nf.InstanceNormAct3d and norm["NORMFUSED_GROUP", 2] is nf.GroupNormAct


LEAKY = ("leakyrelu", {"negative_slope": 0.1, "inplace": True})


@pytest.mark.parametrize(
    ("norm_given", "act", "options", "fused"),
    [
        ("instance", LEAKY, {}, Activation("leaky_relu", 0.1)),
        (("INSTANCE_NVFUSER", {"affine": True}), LEAKY, {"dropout": 0.3}, Activation("leaky_relu", 0.1)),
        (("group", {"num_groups": 2}), "gelu", {"ordering": "NA"}, Activation("gelu")),
        (("group", {"num_groups": 2}), "mish", {"ordering": "adna"}, Activation("mish")),
        ("normfused_switch", "RELU", {}, Activation("relu")),
        ("batch", "gelu", {"dropout": 0.3}, None),  # dropout does not commute with it
        ("batch", "relu", {"ordering": "ADN"}, None),
        ("batch", "prelu", {}, None),  # its weight has a key of its own
        ("batch", "selu", {}, None),
        ("batch", None, {}, None),
        (("batch", {"act": "silu"}), "relu", {}, None),
    ],
)
def test_norm_act(norm_given: Any, act: Any, options: dict[str, Any], fused: Any) -> None:
    given = norm_given if isinstance(norm_given, str) else norm_given[1]
    made = monai.norm_act(norm_given, act, **options)
    name, arguments = made["norm"]
    assert name in monai.NAMES
    if fused is None:
        assert made["act"] == act and arguments == (given if isinstance(given, dict) else {})
    else:
        assert made["act"] == "" and arguments.pop("act") == fused and arguments == (given if isinstance(given, dict) else {})


def test_filter_response_norm_has_one_activation(norm: Any) -> None:
    name, arguments = monai.norm_act("filterresponse", "relu")["norm"]
    layer = norm[name, 2](num_features=4, **arguments)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(layer(x), torch.relu(nf.FilterResponseNorm2d(4, tlu=False)(x)))


def test_errors() -> None:
    with pytest.raises(ValueError, match="norm must be one of batch, instance.* got 'localresponse'"):
        monai.norm_act("localresponse", "relu")
    with pytest.raises(ValueError, match="ordering must be of the letters A, D, N, got 'NXA'"):
        monai.norm_act("batch", "relu", ordering="NXA")


def test_without_monai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai.networks.layers.factories", None)
    with pytest.raises(ImportError, match="pip install monai"):
        monai.register()


# network, how many norms it has, how many of them with an activation
NETWORKS: dict[str, tuple[Callable[[Any, dict[str, Any]], nn.Module], dict[str, Any], int, int]] = {
    "UNet": (lambda n, k: n.UNet(2, 1, 2, (4, 8, 16), (2, 2), num_res_units=2, **k), {"norm": "instance", "act": LEAKY}, 9, 9),
    "UNet, AND": (
        lambda n, k: n.UNet(2, 1, 2, (4, 8), (2,), adn_ordering="AND", **k),
        {"norm": "batch", "act": "relu", "ordering": "AND"}, 2, 0,
    ),
    "BasicUNet": (
        lambda n, k: n.BasicUNet(2, 1, 2, (4, 4, 4, 4, 4, 4), **k),
        {"norm": ("instance", {"affine": True}), "act": LEAKY}, 18, 18,
    ),
    "SegResNet": (
        lambda n, k: n.SegResNet(2, 4, 1, 2, blocks_down=(1, 1), blocks_up=(1,), **k),
        {"norm": ("group", {"num_groups": 2}), "act": "relu"}, 7, 7,
    ),
    "DynUNet": (
        lambda n, k: n.DynUNet(2, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), filters=(4, 4, 4), norm_name=k["norm"], act_name=k["act"]),
        {"norm": ("instance", {"affine": True}), "act": LEAKY}, 10, 10,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    try:
        from monai.networks import nets
    except ImportError:
        pytest.skip("monai is not installed")
    make, given, count, activated = NETWORKS[name]
    plain = make(nets, {k: given[k] for k in ("norm", "act")}).double()
    fused = make(nets, monai.norm_act(**given)).double()
    assert list(plain.state_dict()) == list(fused.state_dict())
    fused.load_state_dict(plain.state_dict())
    layers = [m for m in fused.modules() if isinstance(m, NormActMixin)]
    assert (len(layers), sum(m.act is not None for m in layers)) == (count, activated)
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-9, atol=1e-9)
