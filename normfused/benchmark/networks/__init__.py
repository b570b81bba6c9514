"""Whole networks with and without normfused: what a training step takes, and what it keeps.

catalogue.py says which networks, models.py holds those that need nothing but torch, convert.py changes timm's, measure.py runs them.
"""

from __future__ import annotations

from .catalogue import NETWORKS, Network, Size, absent
from .measure import run

__all__ = ["NETWORKS", "Network", "Size", "absent", "run"]
