"""The steps with a factor of the residual and a second output, against plain formulas under autograd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .cases import TOLERANCE, Case
from .check import close
from .formulas import activation


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_epilogue_steps(backend: Any, case: Case, keeps_y: bool) -> None:
    """z = scale*x + shift + factor*residual, y = act(z), shifted = y + after; ``keeps_y``: the backend tells slopes from y where it can."""
    p, like = case.p, {"dtype": case.p.accumulate, "device": case.device}
    make = torch.Generator().manual_seed(case.seed + 1)
    scale, shift, after = (torch.randn(p.N, p.C, generator=make, dtype=torch.float64).to(**like) for _ in range(3))
    factor = None if case.r is None else torch.tensor([-0.7], **like)
    dshifted = torch.empty_like(case.x).copy_(torch.randn(case.x.shape, generator=make, dtype=torch.float64))
    positions = [1] * (case.x.dim() - 2)

    wide = {"x": case.x, "scale": scale, "shift": shift, "residual": case.r, "factor": factor, "after": after, "weight": case.aw}
    leaves = {name: t.detach().to(torch.float64, copy=True).requires_grad_() for name, t in wide.items() if t is not None}
    over = lambda name: leaves[name].view(p.N, p.C, *positions)  # noqa: E731
    z = over("scale") * leaves["x"] + over("shift")
    if case.r is not None:
        z = z + leaves["factor"] * leaves["residual"]
    weight = leaves["weight"].view(-1, *positions) if "weight" in leaves else None
    y = activation(p.act.name, z, weight, {"negative_slope": p.act.p0})
    shifted = y + over("after")
    names = [name for name in leaves if name != "after"]
    gradients = torch.autograd.grad((y, shifted), [*(leaves[n] for n in names), z], (case.dy.double(), dshifted.double()))
    want, dz = dict(zip(names, gradients, strict=False)), gradients[-1]

    tolerance, exact = TOLERANCE[p.dtype], 10 * TOLERANCE[p.accumulate]
    with poisoned():
        forward = (p, case.x, case.r, scale, shift, case.aw, factor, after)
        got_y, got_shifted = backend.apply(*forward)
        close("y", got_y, y, tolerance)
        close("shifted", got_shifted, shifted, tolerance)
        assert got_shifted.stride() == got_y.stride() == case.x.stride()
        absent, alone = backend.apply(*forward, False)
        assert absent is None and torch.equal(alone, got_shifted)

        source = None
        if case.r is not None and p.act.name != "identity":
            source = got_y if keeps_y and p.z_source == "y" else case.r
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        call = (p, case.dy, case.x, source, zero, scale, shift, case.aw)
        sum_dz, sum_dz_x, dact_weight = backend.grad_moments(*call, factor, dshifted)
        close("sum of dz", sum_dz, want["shift"], exact, scale=1.0)
        close("sum of dz*x", sum_dz_x, want["scale"], exact, scale=1.0)
        assert (dact_weight is None) == (case.aw is None)
        if dact_weight is not None:
            close("dact_weight", dact_weight, want["weight"], exact, scale=1.0)
        needs = (True, case.r is not None, False)
        dx, dresidual = backend.grad_apply(*call, scale, zero, zero, needs, factor, dshifted)
        close("dx", dx, want["x"], tolerance)
        if case.r is None:
            return
        close("dresidual", dresidual, want["residual"], tolerance)
        close("both at once", (dz * case.r.double()).sum(), want["factor"].sum(), 1e-12, scale=float(dz.abs().sum()))  # the oracle itself
        against = backend.grad_moments(*call, factor, dshifted, case.r)
        assert torch.equal(against[0], sum_dz)
        close("sum of dz*residual", against[1], (dz * case.r.double()).flatten(2).sum(2), exact, scale=1.0)
        if p.act.name in ("relu", "leaky_relu"):  # y tells the slope as z does
            at_y = (p, case.dy, got_y, None, zero, one, zero, None)
            for got, same in zip(backend.grad_apply(*at_y, scale, zero, zero, needs, factor, dshifted), (dx, dresidual), strict=True):
                assert torch.equal(got, same)
            other = backend.grad_moments(*at_y, factor, dshifted, case.x)
            close("sum of dz*x beside y", other[1], want["scale"], exact, scale=1.0)
