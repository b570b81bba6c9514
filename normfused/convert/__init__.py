"""Existing networks: their norms made normfused's and back, and the converters and freezers that keep a fused activation."""

from __future__ import annotations

from .fuse import fuse_norms, unfuse_norms
from .report import FusionReport, Row

__all__ = ["FusionReport", "Row", "fuse_norms", "unfuse_norms"]
