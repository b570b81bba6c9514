"""MONAI: normfused's layers by name in the ``norm=`` arguments of its networks, with the activation that follows inside.

`register` adds the names to ``monai.networks.layers.factories.Norm``; `norm_act` spells MONAI's pair of ``norm=`` and ``act=``, in the
order of its ADN blocks, so that the norm applies the activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import normfused

from ..activations import IDENTITY, from_module
from ..convert.swap import twin
from ._common import required

__all__ = ["NAMES", "norm_act", "register"]

_BY_DIMENSION = {
    "batch": "BatchNormAct",
    "instance": "InstanceNormAct",
    "batchrenorm": "BatchRenormAct",
    "batchinstance": "BatchInstanceNormAct",
    "switch": "SwitchNormAct",
    "filterresponse": "FilterResponseNorm",
    "eval": "EvalNorm",
}
_OTHERS = {"group": "GroupNormAct", "layer": "LayerNormAct", "syncbatch": "SyncBatchNormAct"}
_PREFIX = "normfused_"
NAMES = tuple(_PREFIX + name for name in (*_BY_DIMENSION, *_OTHERS))
# act(m x) = m act(x) for a dropout's mask m >= 0
_HOMOGENEOUS = ("relu", "leaky_relu")


def register() -> tuple[str, ...]:
    """Add normfused's layers to MONAI's ``Norm`` factory; again is harmless.

    MONAI's names with ``normfused_`` before them, of any number of dimensions: ``"normfused_instance"``,
    ``("normfused_group", {"num_groups": 8, "act": "relu"})``, and the norms that MONAI does not have. The dictionary is the layer's
    arguments; MONAI fills in the number of channels.

    Returns:
        The names.

    Raises:
        ImportError: no MONAI.
    """
    norm = required("monai.networks.layers.factories", "monai").Norm
    for name, family in _BY_DIMENSION.items():
        norm.add_factory_callable(_PREFIX + name, _of_dimension(family), f"normfused.{family}1d, 2d or 3d")
    for name, layer in _OTHERS.items():
        norm.add_factory_class(_PREFIX + name, getattr(normfused, layer), f"normfused.{layer}")
    return NAMES


def _of_dimension(family: str) -> Callable[[int], type]:
    def layer(dim: int) -> type:
        found: type = getattr(normfused, f"{family}{dim}d")
        return found

    return layer


def norm_act(norm: Any, act: Any, *, ordering: str = "NDA", dropout: Any = None) -> dict[str, Any]:
    """``norm=`` and ``act=`` for networks whose every norm is followed by the activation, which the norm then applies.

    ``UNet(..., **norm_act("instance", ("leakyrelu", {"inplace": True})))``. State dicts stay MONAI's: a PReLU, whose weight has a name
    of its own, stays where it is (`normfused.fuse_norms` of the network fuses it too). Not for networks with a norm that no activation
    follows at once, such as ``DynUNet(res_block=True)``, which adds before it activates: convert these with `normfused.fuse_norms`.

    Args:
        norm: what MONAI takes: a name, or (name, arguments). ``instance_nvfuser`` is taken as ``instance``.
        act: likewise; None for none.
        ordering: of MONAI's ADN (default ``"NDA"``, the default of `UNet`, ``adn_ordering=``). The activation is fused where it follows
            the norm: directly, or past a dropout that is not there or that commutes with it (ReLU, LeakyReLU).
        dropout: what the network is given for it (default None: none).

    Returns:
        ``{"norm": ..., "act": ...}``; ``act`` is ``""``, MONAI's word for none, where the norm applies it.

    Raises:
        ImportError: no MONAI. ValueError: a norm that normfused does not have, or letters that ADN does not know.
    """
    layers = required("monai.networks.layers.utils", "monai")
    split = required("monai.networks.layers.factories", "monai").split_args
    register()
    letters = ordering.upper()
    if not set(letters) <= set("ADN"):
        raise ValueError(f"norm_act: ordering must be of the letters A, D, N, got {ordering!r}")
    name, options = split(norm)
    own = str(name).lower().removeprefix(_PREFIX).removesuffix("_nvfuser")
    if _PREFIX + own not in NAMES:
        raise ValueError(f"norm_act: norm must be one of {', '.join((*_BY_DIMENSION, *_OTHERS))}, got {name!r}")
    if own == "filterresponse" and act is not None:
        options = {"tlu": False, **options}
    apart = {"norm": (_PREFIX + own, dict(options)), "act": act}
    if act is None or "act" in options:
        return apart
    made: nn.Module = layers.get_act_layer(act)
    held = twin(made)
    found = None if held is None else from_module(held)
    if found is None or found == IDENTITY or any(True for _ in made.parameters()):
        return apart
    between = "" if dropout in (None, 0, 0.0) or found.name in _HOMOGENEOUS else "D"
    follows = "".join(letter for letter in letters if letter != "D" or between)
    if "NA" not in follows:
        return apart
    return {"norm": (_PREFIX + own, {**options, "act": found}), "act": ""}
