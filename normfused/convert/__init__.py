"""Existing networks: their norms made normfused's and back, and the converters and freezers that keep a fused activation."""

from __future__ import annotations

from . import guards
from .batch_norms import convert_sync_batchnorm, freeze_batch_norm, fuse_conv_norm_eval
from .fuse import fuse_norms, unfuse_norms
from .guards import allow_lossy_conversion
from .report import FusionReport, Row

__all__ = [
    "FusionReport",
    "Row",
    "allow_lossy_conversion",
    "convert_sync_batchnorm",
    "freeze_batch_norm",
    "fuse_conv_norm_eval",
    "fuse_norms",
    "unfuse_norms",
]

guards.install()
