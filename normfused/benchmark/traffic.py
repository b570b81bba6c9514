"""Stand-in."""

from __future__ import annotations

from .cases import Case


def floor_bytes(case: Case, direction: str, mode: str) -> int:
    both, forward = case.floor_bytes("forward_backward"), case.floor_bytes("forward")
    return {"forward": forward, "backward": both - forward, "forward_backward": both}[direction]
