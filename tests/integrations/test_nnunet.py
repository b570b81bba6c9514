"""Plans with fused norms describe the same network under the same keys, and the way back is exact."""

from __future__ import annotations

import copy
import inspect
import json
import pydoc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import normfused as nf
from normfused.integrations import nnunet

OWN = "tests.integrations.networks"
REAL = "dynamic_network_architectures.architectures.unet"


def plans(network: str = f"{OWN}.PlainConvUNet", **changed: Any) -> dict[str, Any]:
    """Of one configuration with an architecture and one that inherits it."""
    arguments: dict[str, Any] = {
        "features_per_stage": [4, 6],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"negative_slope": 0.2, "inplace": True},
    }
    architecture = {
        "network_class_name": network,
        "arch_kwargs": arguments | changed,
        "_kw_requires_import": ["conv_op", "norm_op", "nonlin"],
    }
    return {
        "plans_name": "own",
        "configurations": {"3d": {"patch_size": [8, 8, 8], "architecture": architecture}, "cascade": {"inherits_from": "3d"}},
    }


def build(made: dict[str, Any]) -> nn.Module:
    """What nnU-Net does with plans, read back from their file."""
    architecture = json.loads(json.dumps(made))["configurations"]["3d"]["architecture"]
    arguments = architecture["arch_kwargs"]
    for key in architecture["_kw_requires_import"]:
        arguments[key] = None if arguments[key] is None else pydoc.locate(arguments[key])
    cls: Any = pydoc.locate(architecture["network_class_name"])
    torch.manual_seed(0)
    network: nn.Module = cls(input_channels=1, num_classes=2, deep_supervision=False, **arguments)
    return network.apply(network.initialize).double()  # type: ignore[arg-type]


def norms(network: nn.Module) -> list[Any]:
    return [m for m in network.modules() if isinstance(m, nn.modules.instancenorm._InstanceNorm)]


def check(made: dict[str, Any], channels_last: bool, activated: int) -> None:
    """Same keys, values, outputs and gradients in float64; ``activated`` norms have an activation."""
    before = copy.deepcopy(made)
    fused = nnunet.fuse_plans(made, channels_last=channels_last)
    assert made == before and nnunet.fuse_plans(fused) == fused and nnunet.unfuse_plans(json.loads(json.dumps(fused))) == made
    assert fused["configurations"]["cascade"] == {"inherits_from": "3d"}
    plain, network = build(made), build(fused)
    assert list(network.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(network.state_dict())
    network.load_state_dict(plain.state_dict())
    layers = norms(network)
    assert layers and all(type(m) is nf.InstanceNormAct3d for m in layers)
    assert sum(m.act is not None for m in layers) == activated
    x = torch.randn(2, 1, 8, 8, 8, dtype=torch.float64)
    y, wanted = network(x), plain(x)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
    y.square().mean().backward()
    wanted.square().mean().backward()
    for (name, p), q in zip(network.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)
    seen: list[bool] = []

    def look(layer: nn.Module, given: Any, y: torch.Tensor) -> None:
        seen.append(all(t.is_contiguous(memory_format=torch.channels_last_3d) for t in (given[0], y)))

    # ATen's convolutions on CPU have channels_last in float32 only, and with one thread not of 1x1x1
    units = [m for m in network.modules() if hasattr(m, "norm") and m.conv.kernel_size != (1, 1, 1)]
    for unit in units:
        unit.norm.register_forward_hook(look)
    network.float()(x.float())
    assert seen == [channels_last] * len(units) and seen


@pytest.mark.parametrize("channels_last", [False, True])
def test_plain_network(channels_last: bool) -> None:
    """By import paths alone; channels_last begins at the first convolution, though its weight has one input channel."""
    made = plans()
    check(made, channels_last, activated=2)
    fused = nnunet.fuse_plans(made, channels_last=channels_last)["configurations"]["3d"]["architecture"]
    assert fused["arch_kwargs"]["norm_op"] == "normfused.InstanceNormAct3d" and fused["arch_kwargs"]["nonlin"] is None
    assert fused["arch_kwargs"]["norm_op_kwargs"] == {"eps": 1e-5, "affine": True, "act": ["leaky_relu", {"negative_slope": 0.2}]}
    assert (fused["network_class_name"] == f"{OWN}.PlainConvUNet") is not channels_last


def test_what_must_not_be_activated_by_the_norm() -> None:
    """An add before the activation, an activation before the norm, one that has a key in the checkpoint."""
    check(plans(f"{OWN}.ResidualEncoderUNet"), True, activated=2)
    check(plans(nonlin_first=True), False, activated=0)
    check(plans(nonlin="torch.nn.PReLU", nonlin_kwargs={}), False, activated=0)


def test_changes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, back = (tmp_path / f"{name}.json" for name in ("own", "Fused", "back"))
    source.write_text(json.dumps(plans()))
    assert nnunet.main([str(source)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "3d: norm_op: torch.nn.modules.instancenorm.InstanceNorm3d -> normfused.InstanceNormAct3d"
    )
    assert nnunet.main([str(source), "--channels-last", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["plans_name"] == "Fused" and "channels_last: - -> True" in capsys.readouterr().out
    assert nnunet.main([str(out), "--undo", "--out", str(back)]) == 0
    assert json.loads(back.read_text()) == plans() | {"plans_name": "back"}
    assert nnunet.main([str(back), "--undo"]) == 0 and "nothing to change" in capsys.readouterr().out
    source.write_text('{"configurations": {"3d": {"UNet_class_name": "PlainConvUNet"}}}')
    assert nnunet.main([str(source)]) == 1 and "must have an architecture" in capsys.readouterr().err


def test_names_that_cannot_be_imported() -> None:
    with pytest.raises(ValueError, match=r"norm_op of 3d must be importable, got 'nowhere\.Norm'"):
        nnunet.fuse_plans(plans(norm_op="nowhere.Norm"))
    with pytest.raises(ImportError, match=r"network_class_name must be importable, got 'nowhere\.Net'"):
        nnunet.build_network(1, 2, network_class_name="nowhere.Net")


def test_trainer() -> None:
    """nnU-Net asks for the parameters' names to tell its two generations of trainers apart."""

    class Trainer:
        @staticmethod
        def build_network_architecture(plans_manager: Any, num_input_channels: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(num_input_channels, 4, 3), nn.InstanceNorm2d(4), nn.LeakyReLU())

    class Fused(Trainer):
        build_network_architecture = staticmethod(nnunet.fused(Trainer.build_network_architecture, channels_last=True))

    assert list(inspect.signature(Fused().build_network_architecture).parameters) == ["plans_manager", "num_input_channels"]
    network = Fused.build_network_architecture(None, num_input_channels=3)
    assert isinstance(network, nn.Sequential) and type(network[1]) is nf.InstanceNormAct2d
    assert network(torch.randn(1, 3, 6, 6)).is_contiguous(memory_format=torch.channels_last)
    # with several GPUs nnU-Net calls this on every network
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(network)[1]) is nf.InstanceNormAct2d


@pytest.mark.parametrize(("name", "activated"), [("PlainConvUNet", 6), ("ResidualEncoderUNet", 11)])
def test_networks_of_nnunet(name: str, activated: int) -> None:
    try:
        pydoc.locate(REAL) or pytest.skip("dynamic_network_architectures is not installed")
    except pydoc.ErrorDuringImport as error:
        pytest.skip(f"dynamic_network_architectures: {error}")
    stages = {"n_stages": 2, "kernel_sizes": [[3, 3, 3]] * 2, "strides": [[1, 1, 1], [2, 2, 2]], "conv_bias": True}
    blocks = "n_blocks_per_stage" if name.startswith("Residual") else "n_conv_per_stage"
    check(plans(f"{REAL}.{name}", **stages, **{blocks: [2, 2]}, n_conv_per_stage_decoder=[2]), True, activated)
