"""The public functions in short, so that they also run through Triton's interpreter in a minute: all norms, types, layouts, acts."""

from __future__ import annotations

import itertools

import pytest
import torch

from normfused import ACTIVATIONS
from tests.support.check import HALF, arguments, compare, data, layout
from tests.support.formulas import BY_NAME, KINDS, Kind

pytestmark = pytest.mark.triton_surface


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_types_layouts_residuals(kind: Kind, dtype: torch.dtype, backend: str) -> None:
    for form, (act, mode) in itertools.product(
        ("contiguous", "channels_last", "slice"), (("relu", None), ("gelu", "pre_act"), ("relu", "pre_act"), ("tanh", "post_act"))
    ):
        a = arguments(kind, kind.shape, dtype, torch.float32 if dtype in HALF else dtype, act=act, mode=mode)
        compare(kind, layout(data(kind.shape, dtype), form), a, backend)
    if kind.pre_norm:
        compare(kind, data(kind.shape, dtype), arguments(kind, kind.shape, dtype, act="relu", mode="pre_norm"), backend)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("name", ["batch", "batch_eval", "group_3", "layer_rows", "frn_epsC"])
def test_activations(name: str, act: str, backend: str) -> None:
    kind = BY_NAME[name]
    for mode in (None, "pre_act"):
        compare(kind, data(kind.shape), arguments(kind, kind.shape, act=act, mode=mode), backend)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_float64_and_missing_gradients(kind: Kind, backend: str) -> None:
    compare(kind, data(kind.shape, torch.float64), arguments(kind, kind.shape, torch.float64, act="silu", mode="pre_act"), backend)
    for affine, need_x in ((False, True), (True, False)):
        compare(kind, data(kind.shape), arguments(kind, kind.shape, act="relu", affine=affine), backend, need_x=need_x)
