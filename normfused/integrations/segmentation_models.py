"""segmentation_models_pytorch: decoders whose blocks are built with norm and activation in one.

Its ``decoder_use_norm`` (``decoder_use_batchnorm`` before 0.5) takes names of its own list. One of them, ``"inplace"``, stands for norm and
activation in one layer, of a package that few have; within `patched` that layer is normfused's. A network that is built needs none of
this: `normfused.fuse_norms` of it takes over encoder and decoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..convert.guards import activation_of
from ._common import check_kind, make, required

__all__ = ["patched"]

_PARAMETER = {"leaky_relu": "negative_slope", "elu": "alpha"}


class _AsInPlaceABN(type):
    """What the decoders ask: whether a norm brings its activation along."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return activation_of(instance) is not None

    def __call__(
        cls, num_features: int, activation: Any = "relu", activation_param: float | None = None, norm: str | type = "bn", **options: Any
    ) -> nn.Module:
        check_kind("patched", norm)
        act = activation
        if activation == "leaky_relu" and activation_param == 0.0:
            act = "relu"  # what the decoders ask for
        elif activation_param is not None:
            if activation not in _PARAMETER:
                raise ValueError(f"patched: activation_param needs activation leaky_relu or elu, got {activation!r}")
            act = (activation, {_PARAMETER[activation]: activation_param})
        return make(norm, num_features, act, **options)


class _InPlaceABN(metaclass=_AsInPlaceABN):
    pass


@contextmanager
def patched() -> Iterator[None]:
    """Within it, ``decoder_use_norm="inplace"`` builds batch norm and ReLU as one layer of normfused's, with ``"batchnorm"``'s checkpoint.

    As a dict, ``{"type": "inplace", "norm": "gn", "num_groups": 8, "activation": "silu"}`` chooses the norm (``bn`` ``sync_bn``
    ``in`` ``gn`` ``ln2d`` ``rms2d`` ``frn``, or a class of normfused's), the activation and options of the layer's constructor.

    Left, the package is as it was. It holds for all threads.

    Raises:
        ImportError: no segmentation_models_pytorch. RuntimeError: a version that builds its blocks elsewhere.
    """
    modules = required("segmentation_models_pytorch.base.modules", "segmentation-models-pytorch")
    if not hasattr(modules, "InPlaceABN"):
        raise RuntimeError(
            f"normfused.integrations.segmentation_models: {modules.__name__} must have InPlaceABN, got a version without it;"
            " normfused.fuse_norms(model) needs none"
        )
    before = modules.InPlaceABN
    modules.InPlaceABN = _InPlaceABN
    try:
        yield
    finally:
        modules.InPlaceABN = before
