"""nnU-Net: fused norms and channels_last by the plans file alone.

A plans file names the layers of every configuration by import path (``norm_op: "torch.nn.modules.instancenorm.InstanceNorm3d"``), and
nnU-Net imports them. `fuse_plans` writes normfused's in their place; checkpoints stay interchangeable, since no key changes.

    python -m normfused.integrations.nnunet nnUNetPlans.json                                    # what it would change
    python -m normfused.integrations.nnunet nnUNetPlans.json --out nnUNetPlansNormfused.json
    nnUNetv2_train ... -p nnUNetPlansNormfused
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import pydoc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..activations import IDENTITY, from_module
from ..convert import fuse_norms

__all__ = ["build_network", "changes", "fuse_plans", "fused", "to_channels_last", "unfuse_plans"]

_BEFORE = "before_normfused"
_NORMS = {getattr(nn, f"{kind}{d}d"): f"normfused.{kind}Act{d}d" for kind in ("InstanceNorm", "BatchNorm") for d in (1, 2, 3)}
# of these, every norm is followed by the activation; the others may add in between and are converted when they have been built
_ALWAYS_ACTIVATED = ("PlainConvUNet",)
_BUILDER = "normfused.integrations.nnunet.build_network"
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def fuse_plans(plans: dict[str, Any], *, channels_last: bool = False) -> dict[str, Any]:
    """The plans of nnU-Net with fused norms in every configuration that describes its architecture.

    ``PlainConvUNet``: ``norm_op`` becomes normfused's by import path, with the activation among ``norm_op_kwargs`` and ``nonlin: null``.
    Other networks (residual encoders, your own) become `build_network`, which makes them as described and runs `normfused.fuse_norms`.
    Each configuration keeps what was replaced, for `unfuse_plans`; nnU-Net does not read that. Fusing again changes nothing.

    Args:
        plans: the content of a plans file, not modified.
        channels_last: also keep weights, and with them activations, in channels_last (2-D) or channels_last_3d.

    Raises:
        ValueError: no configuration has an ``architecture`` (plans before nnU-Net 2.4: plan again, or use `fused` in a trainer), or a
            norm or network in it cannot be imported.
    """
    made = copy.deepcopy(plans)
    architectures = dict(_architectures(made))
    if not architectures:
        raise ValueError(
            "fuse_plans: a configuration must have an architecture, as plans of nnU-Net 2.4 and later do, got none; plan again"
        )
    for where, architecture in architectures.items():
        if _BEFORE in architecture:
            continue
        arguments = architecture["arch_kwargs"]
        network = architecture["network_class_name"]
        new = dict(arguments)
        is_plain = network.rpartition(".")[2] in _ALWAYS_ACTIVATED
        if is_plain:
            new |= _fused_arguments(where, arguments)
        if channels_last or not is_plain:
            new |= {"network_class_name": network, "channels_last": channels_last}
            architecture["network_class_name"] = _BUILDER
        architecture["arch_kwargs"] = new
        architecture[_BEFORE] = {"network_class_name": network, "arch_kwargs": arguments}
    return made


def _fused_arguments(where: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """``norm_op``, ``norm_op_kwargs`` and ``nonlin`` as they become."""
    if arguments.get("norm_op") is None:
        return {}
    path = _NORMS.get(_located(where, "norm_op", arguments["norm_op"]))
    if path is None:
        return {}
    options = dict(arguments.get("norm_op_kwargs") or {})
    new: dict[str, Any] = {"norm_op": path, "norm_op_kwargs": options}
    if arguments.get("nonlin") is not None and not arguments.get("nonlin_first", False):
        given = arguments.get("nonlin_kwargs") or {}
        act = _located(where, "nonlin", arguments["nonlin"])(**given)
        found = from_module(act)
        # an activation with a weight has a key in the checkpoint, which must stay
        if found is not None and found != IDENTITY and not list(act.parameters()):
            numbers = {key: value for key, value in given.items() if key != "inplace"}
            options["act"] = [found.name, numbers] if numbers else found.name
            new["nonlin"] = None
    return new


def _located(where: str, key: str, path: str) -> Any:
    found = pydoc.locate(path)
    if found is None:
        raise ValueError(f"fuse_plans: {key} of {where} must be importable, got {path!r}")
    return found


def _architectures(plans: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, configuration in plans.get("configurations", {}).items():
        if "architecture" in configuration:
            yield name, configuration["architecture"]


def unfuse_plans(plans: dict[str, Any]) -> dict[str, Any]:
    """The plans that `fuse_plans` was given: what it replaced, put back. Changes made since to these entries are lost."""
    made = copy.deepcopy(plans)
    for _, architecture in _architectures(made):
        architecture.update(architecture.pop(_BEFORE, {}))
    return made


def changes(plans: dict[str, Any]) -> list[str]:
    """What `fuse_plans` changed, a line an entry: ``3d_fullres: norm_op: torch.nn...InstanceNorm3d -> normfused.InstanceNormAct3d``."""
    lines = []
    for name, now in _architectures(plans):
        before = now.get(_BEFORE)
        if before is None:
            continue
        pairs = {"network_class_name": (before["network_class_name"], now["network_class_name"])}
        old, new = before["arch_kwargs"], now["arch_kwargs"]
        pairs |= {key: (old.get(key, "-"), new[key]) for key in new if key != "network_class_name"}
        lines += [f"{name}: {key}: {was} -> {is_}" for key, (was, is_) in pairs.items() if was != is_]
    return lines


def fused(build: Callable[..., nn.Module], *, channels_last: bool = False) -> Callable[..., nn.Module]:
    """``build``, a network's class or a trainer's ``build_network_architecture``, whose networks then have fused norms.

    For trainers (the signature stays, which nnU-Net asks for; prediction builds the network the same way)::

        class nnUNetTrainerNormfused(nnUNetTrainer):
            build_network_architecture = staticmethod(fused(nnUNetTrainer.build_network_architecture, channels_last=True))
    """

    @functools.wraps(build, updated=())
    def building(*args: Any, **kwargs: Any) -> nn.Module:
        network = build(*args, **kwargs)
        fuse_norms(network)
        return to_channels_last(network) if channels_last else network

    return building


def build_network(
    input_channels: int, num_classes: int, *, network_class_name: str, channels_last: bool = False, **arguments: Any
) -> nn.Module:
    """The network that plans describe, with fused norms: what `fuse_plans` writes as ``network_class_name`` for nnU-Net to call.

    Args:
        network_class_name: import path of the network. channels_last: as in `fuse_plans`. arguments: the network's.

    Raises:
        ImportError: no such network.
    """
    network = pydoc.locate(network_class_name)
    if not callable(network):
        raise ImportError(f"build_network: network_class_name must be importable, got {network_class_name!r}")
    return fused(network, channels_last=channels_last)(input_channels=input_channels, num_classes=num_classes, **arguments)


def to_channels_last(network: nn.Module) -> nn.Module:
    """``network`` with its 4-D weights in channels_last and its 5-D weights in channels_last_3d, in place.

    A convolution whose weight is in that format answers in it, whatever its input's; normfused's instance norm keeps it, where torch's
    goes back to contiguous. State dicts hold the same values under the same names.
    """
    for parameter in network.parameters():
        if parameter.dim() in _FORMATS:
            # not contiguous(), which leaves a weight for one input channel with strides that do not tell the format
            parameter.data = parameter.data.clone(memory_format=_FORMATS[parameter.dim()])
    return network


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m normfused.integrations.nnunet", description="nnU-Net's plans with fused norms.")
    parser.add_argument("plans", type=Path, help="plans file of nnU-Net (json)")
    parser.add_argument("--out", type=Path, help="file to write; its name becomes plans_name, the -p of nnU-Net (default: only report)")
    parser.add_argument("--channels-last", action="store_true", help="weights and activations in channels_last")
    parser.add_argument("--undo", action="store_true", help="the way back")
    given = parser.parse_args(arguments)
    plans = json.loads(given.plans.read_text())
    try:
        made = unfuse_plans(plans) if given.undo else fuse_plans(plans, channels_last=given.channels_last)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    lines = [f"put back: {line}" for line in changes(plans)] if given.undo else changes(made)
    print("\n".join(lines) or "nothing to change")
    if given.out is not None:
        made["plans_name"] = given.out.stem
        given.out.write_text(json.dumps(made, indent=4) + "\n")
        print(f"{given.out} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
