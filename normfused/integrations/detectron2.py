"""detectron2: norms for its ``norm=`` arguments, which take a name of its own list or a function of the number of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..activations import ActivationLike, parse
from ._common import check_kind, make

__all__ = ["norm"]

# detectron2's names, as in its ``get_norm``
_NAMES = {"BN": "bn", "SyncBN": "sync_bn", "nnSyncBN": "sync_bn", "naiveSyncBN": "sync_bn", "naiveSyncBN_N": "sync_bn"}
_NAMES |= {"FrozenBN": "frozen_bn", "GN": "gn", "LN": "ln2d"}
# its layer norm's eps, where it is not torch's
_OPTIONS: dict[str, dict[str, Any]] = {"LN": {"eps": 1e-6}}


def norm(kind: str | type = "FrozenBN", act: ActivationLike = None, **options: Any) -> Callable[[int], nn.Module]:
    """A function to pass as ``norm=`` to detectron2's backbones, heads and ``get_norm``, in place of a name.

    Args:
        kind: detectron2's names ``BN`` ``SyncBN`` ``FrozenBN`` (default) ``GN`` ``LN`` (over the channels), others as in
            `normfused.integrations.timm.norm_layer`, or a class of normfused's that takes the number of channels.
        act: the activation that follows, where the block applies none (default: none).
        options: of the layer's constructor; ``num_groups=32`` for group norm, as detectron2.

    Returns:
        A function of the number of channels. It pickles, so that a lazy config may hold it.

    Raises:
        ValueError: an unknown kind or activation.
    """
    known = _NAMES.get(kind, kind) if isinstance(kind, str) else kind
    check_kind("norm", known)
    parse(act)
    return _Norm(known, act, {**_OPTIONS.get(str(kind), {}), **options})


class _Norm:
    """The function, as an object that pickles and prints."""

    def __init__(self, kind: str | type, act: ActivationLike, options: dict[str, Any]) -> None:
        self.kind, self.act, self.options = kind, act, options

    def __call__(self, out_channels: int) -> nn.Module:
        return make(self.kind, out_channels, self.act, **self.options)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"norm({self.kind!r}, act={self.act!r}{options})"
