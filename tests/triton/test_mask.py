"""The bit mask: what it holds, where it lies, and the backward from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from normfused.backends.triton.plan import mask_group
from normfused.problem import CHANNEL, RMS, SAMPLE_GROUP, STANDARD

from .cases import Case

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
ACTS = ("relu", "leaky_relu", "relu6", "hardsigmoid", "tlu")
NORMS = {
    "batch": (CHANNEL, STANDARD, 1),
    "instance": (SAMPLE_GROUP, STANDARD, 16),
    "groups of 2": (SAMPLE_GROUP, STANDARD, 8),
    "groups of 8": (SAMPLE_GROUP, STANDARD, 2),
    "frn": (SAMPLE_GROUP, RMS, 16),
}


@pytest.mark.parametrize("route", ["single_pass", "two_pass"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("norm", NORMS)
def test_backward_from_the_mask(norm: str, layout: str, route: str, device: torch.device) -> None:
    scope, rule, groups = NORMS[norm]
    turn = list(NORMS).index(norm) + (layout == "nhwc") + 2 * (route == "two_pass")
    act, dtype = ACTS[turn % len(ACTS)], DTYPES[turn % len(DTYPES)]
    case = Case(scope, rule, (2, 16, 4, 4), groups, layout=layout, dtype=dtype, act=act, residual="pre_act", route=route, device=device)
    assert mask_group(case.p) == 16 // dtype.itemsize
    case.check()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_bits_lie_in_the_order_of_x(layout: str, device: torch.device) -> None:
    case = Case(CHANNEL, shape=(3, 8, 4, 6), layout=layout, dtype=torch.float16, act="relu", residual="pre_act", device=device)
    y, *_ = case.forward()
    flat = (y if layout == "nchw" else y.movedim(1, -1)).reshape(-1, 8) > 0
    assert case.mask is not None
    assert torch.equal(case.mask.long(), (flat << torch.arange(8, device=flat.device)).sum(1))


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (2, 6, 4, 4), "layout": "nhwc"},  # runs of channels are no whole vectors
        {"shape": (2, 8, 3, 3)},  # nor are those of positions
        {"shape": (2, 24, 4, 4), "layout": "nhwc", "scope": SAMPLE_GROUP, "groups": 8},  # groups of 3 channels share vectors
        {"act": "silu"},
        {"residual": "post_act"},
        {"residual": None},
    ],
)
def test_where_there_is_none(options: dict[str, Any], device: torch.device) -> None:
    case = Case(**{"scope": CHANNEL, "shape": (2, 8, 4, 4), "act": "relu", "residual": "pre_act", "device": device, **options})
    assert mask_group(case.p) == 0
    case.check()
