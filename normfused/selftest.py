"""A backend against the reference in float64, on four small norms: for ``python -m normfused`` and before any benchmark."""

from __future__ import annotations

from typing import Any

import torch

from . import dispatch
from . import functional as nF

# Of the largest reference value. One rounding of the output for half types; float32 has some 2e-7 (methods: float64 oracle).
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}


def run(backend: str, device: str) -> dict[str, Any]:
    """Largest error of y and dx over four norms, relative to the largest value, against the reference in float64."""
    worst, where = 0.0, ""
    generator = torch.Generator().manual_seed(0)
    for dtype, bound in _TOLERANCE.items():
        if dispatch.unavailable(backend, device, dtype) is not None:
            continue
        x = (torch.randn(2, 8, 5, 7, generator=generator) * 2 + 1).to(device, dtype)
        dy = torch.randn(2, 8, 5, 7, generator=generator).to(device, dtype)
        weight, bias = (torch.randn(8, generator=generator).to(device, dtype) for _ in range(2))
        cases: dict[str, Any] = {
            "batch norm + relu": lambda x, w, b, which: nF.batch_norm_act(x, None, None, w, b, True, act="relu", backend=which),
            "group norm + silu": lambda x, w, b, which: nF.group_norm_act(x, 2, w, b, act="silu", backend=which),
            "layer norm (dim=1) + gelu": lambda x, w, b, which: nF.layer_norm_act(x, 8, w, b, dim=1, act="gelu", backend=which),
            "FRN + TLU": lambda x, w, b, which: nF.filter_response_norm(x, w, b, torch.full_like(b, -0.5), backend=which),
        }
        for name, call in cases.items():
            got: list[torch.Tensor] = []
            want: list[torch.Tensor] = []
            for which, kind, out in ((backend, dtype, got), ("reference", torch.float64, want)):
                leaf = x.to(kind).requires_grad_()
                y = call(leaf, weight.to(kind), bias.to(kind), which)
                (dx,) = torch.autograd.grad(y, leaf, dy.to(kind))
                out += [y.detach().double(), dx.double()]
            error = max(float((g - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True)) / bound
            if not error <= worst:  # also true for NaN
                worst, where = error, f"{name} {str(dtype).removeprefix('torch.')}"
    return {"passed": worst <= 1.0, "worst_error_of_tolerance": worst, "worst_case": where}
