"""Every norm function, forward and backward, against the float64 formulas: activations, residuals, types, layouts, subsets."""

from __future__ import annotations

import itertools

import pytest
import torch

from normfused import ACTIVATIONS
from tests.support.check import DTYPES, HALF, LAYOUTS, arguments, compare, data, layout
from tests.support.formulas import KINDS, Kind

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)


@kinds
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_and_residuals(kind: Kind, act: str, backend: str) -> None:
    """All 16 activations with every residual mode; one test per pair, the modes inside, as they share nothing but the numbers."""
    x = data(kind.shape)
    for mode in kind.modes():
        compare(kind, x, arguments(kind, kind.shape, act=act, mode=mode), backend)


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", LAYOUTS)
def test_types_and_layouts(kind: Kind, dtype: torch.dtype, form: str, backend: str) -> None:
    """Every type in every memory layout, half types also beside float32 parameters; y and dx keep x's format if it is dense."""
    x = layout(data(kind.shape, dtype), form)
    for parameter_dtype in {dtype, torch.float32} if dtype in HALF else {dtype}:
        for act, mode in (("identity", None), ("relu", "pre_act"), ("silu", "pre_act"), ("tanh", "post_act")):
            a = arguments(kind, kind.shape, dtype, parameter_dtype, act=act, mode=mode, residual_layout="channels_last")
            y, dx = compare(kind, x, a, backend)
            assert dx is not None
            if form in ("contiguous", "channels_last") and kind.dims != "rows":
                assert y.stride() == dx.stride() == x.stride()


@kinds
@pytest.mark.parametrize("dims", [2, 3, 5])
@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
def test_other_numbers_of_dimensions(kind: Kind, dims: int, form: str, backend: str) -> None:
    shape = {2: (5, 12), 3: (3, 6, 7), 5: (2, 6, 3, 2, 5)}[dims]
    if (dims == 2 and (kind.spatial or kind.name == "instance_eval")) or dims <= kind.trailing:
        pytest.skip("instance norm needs positions")
    x = layout(data(shape), form) if dims > 2 else data(shape)
    for act, mode in (("identity", None), ("gelu", "pre_act"), ("relu", "post_act"), ("prelu", None)):
        y, dx = compare(kind, x, arguments(kind, shape, act=act, mode=mode), backend)
        if kind.dims != "rows":
            assert dx is not None and y.stride() == dx.stride() == x.stride()


@kinds
@pytest.mark.parametrize("act", ["identity", "relu", "gelu", "prelu", "tlu"])
def test_subsets_of_gradients(kind: Kind, act: str, backend: str) -> None:
    """Any subset of the inputs may require a gradient, and the ones that do get the right one."""
    x = data(kind.shape)
    for mode in ("pre_act", "post_act", *(("pre_norm",) if kind.pre_norm else ())):
        names = list(arguments(kind, kind.shape, act=act, mode=mode).named())
        for on in itertools.product((False, True), repeat=len(names)):
            if act != "tlu" and 1 < sum(on) < len(names):
                continue  # none, one, all, for most; every subset once
            for need_x in (False, True):
                a = arguments(kind, kind.shape, act=act, mode=mode)
                for name, required in zip(names, on, strict=True):
                    getattr(a, name).requires_grad_(required)
                compare(kind, x, a, backend, need_x=need_x)


@kinds
@pytest.mark.parametrize("affine", ["none", "weight", "bias"])
def test_missing_parameters(kind: Kind, affine: str, backend: str) -> None:
    if affine == "bias" and not kind.bias:
        pytest.skip("has no bias")
    for act, mode, form in itertools.product(("identity", "relu", "silu"), (None, "pre_act"), ("contiguous", "channels_last")):
        a = arguments(kind, kind.shape, act=act, mode=mode)
        a.weight = a.weight if affine == "weight" else None
        a.bias = a.bias if affine == "bias" else None
        compare(kind, layout(data(kind.shape), form), a, backend)


@kinds
@pytest.mark.parametrize("act", ["prelu", "tlu"])
def test_one_shared_activation_weight(kind: Kind, act: str, backend: str) -> None:
    for mode, dtype in itertools.product((None, "pre_act"), (torch.float32, torch.bfloat16)):
        a = arguments(kind, kind.shape, dtype, torch.float32, act=act, mode=mode, shared_act_weight=True)
        compare(kind, data(kind.shape, dtype), a, backend)


@kinds
@pytest.mark.parametrize("form", ["expanded", "transposed", "channels_last", "slice"])
def test_gradient_arrives_in_any_layout(kind: Kind, form: str, backend: str) -> None:
    """dy comes expanded from a sum, or strided; x in the other format."""
    pairs = (("identity", None), ("relu", "pre_act"), ("mish", "pre_act"), ("relu", None), ("mish", "post_act"))
    for (act, mode), x_form in itertools.product(pairs, ("contiguous", "channels_last")):
        dy = layout(data(kind.shape, seed=7), "expanded_last" if form == "expanded" else form)
        compare(kind, layout(data(kind.shape), x_form), arguments(kind, kind.shape, act=act, mode=mode), backend, dy=dy)


@kinds
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_types_with_every_activation(kind: Kind, act: str, dtype: torch.dtype, backend: str) -> None:
    """One rounding of y and dx and float32 parameter gradients, whatever was saved to find the activation's derivative."""
    x = layout(data(kind.shape, dtype), "channels_last")
    for mode in kind.modes():
        compare(kind, x, arguments(kind, kind.shape, dtype, torch.float32, act=act, mode=mode), backend)
