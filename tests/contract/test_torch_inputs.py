"""torch's own module and operator test inputs, run through our layers and functions and compared with torch's.

Outputs, gradients, buffers, state dicts both ways, memory format, and the types of errors.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import normfused as nf
from normfused import functional as nF

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of the largest reference value. Half types are compared with torch in float64 on the same rounded numbers, as torch's own half
# kernels round more than once: one rounding of the result.
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
HALF = (torch.bfloat16, torch.float16)

LAYERS = {
    nn.BatchNorm1d: nf.BatchNormAct1d,
    nn.BatchNorm2d: nf.BatchNormAct2d,
    nn.BatchNorm3d: nf.BatchNormAct3d,
    nn.InstanceNorm1d: nf.InstanceNormAct1d,
    nn.InstanceNorm2d: nf.InstanceNormAct2d,
    nn.InstanceNorm3d: nf.InstanceNormAct3d,
    nn.GroupNorm: nf.GroupNormAct,
    nn.LayerNorm: nf.LayerNormAct,
    nn.RMSNorm: nf.RMSNormAct,
}
FUNCTIONS = {
    "nn.functional.batch_norm": nF.batch_norm_act,
    "nn.functional.instance_norm": nF.instance_norm_act,
    "nn.functional.group_norm": nF.group_norm_act,
    "nn.functional.layer_norm": nF.layer_norm_act,
    "nn.functional.rms_norm": nF.rms_norm_act,
}
MODULES = [m for m in module_db if m.module_cls in LAYERS]
OPERATORS = [o for o in op_db if o.name in FUNCTIONS and o.variant_test_name == ""]


def widened(value):
    """Half tensors as float64, all else as it is."""
    return value.detach().double().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) and value.dtype in HALF else value


def close(got: torch.Tensor, want: torch.Tensor, what: str, roundings: int = 1) -> None:
    assert got.dtype == want.dtype or (got.dtype in HALF and want.dtype == torch.float64), what
    assert got.shape == want.shape, what
    if want.numel() == 0:
        return
    if not want.dtype.is_floating_point:
        assert torch.equal(got, want), what
        return
    # where the true value cancels to nothing (sets of one or two elements) float32 sums leave some 1e-5
    bound = max(roundings * RELATIVE[got.dtype] * float(want.double().abs().max()), RELATIVE[got.dtype] if got.dtype not in HALF else 2e-5)
    error = float((got.double() - want.double()).abs().max())
    assert error <= bound, f"{what}: off by {error:.3g}, allowed {bound:.3g}"


def compare(ours, theirs, tensors, what):
    """Outputs and gradients of two callables on the same tensors."""
    results = []
    tensors_dtype = tensors[0].dtype
    for f in (ours, theirs):
        if f is theirs:
            tensors = [widened(t) for t in tensors]
        leaves = [t.detach().clone().requires_grad_() if t is not None and t.requires_grad else t for t in tensors]
        y = f(*leaves)
        generator = torch.Generator().manual_seed(1)
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        gradients = []
        if y.requires_grad and wanted:
            dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(tensors_dtype).to(y.dtype)
            gradients = torch.autograd.grad(y, wanted, dy, allow_unused=True)
        results.append((y.detach(), gradients))
    (y, g), (y_want, g_want) = results
    close(y, y_want, f"{what}: y")
    for i, (a, b) in enumerate(zip(g, g_want, strict=True)):
        if b is None:
            assert a is None or not a.any(), f"{what}: gradient {i}"
        else:
            close(a, b, f"{what}: gradient {i}")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("info", MODULES, ids=lambda m: m.name)
def test_module_inputs(info, dtype, training):
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    assert inputs
    for case in inputs:
        arguments, keywords = case.constructor_input.args, dict(case.constructor_input.kwargs)
        what = f"{info.name}{arguments}{keywords}"
        torch.manual_seed(0)
        theirs = info.module_cls(*arguments, **keywords).to(dtype).train(training)
        for p in theirs.parameters():
            nn.init.uniform_(p, -1, 1)
        ours = LAYERS[info.module_cls](*arguments, **keywords).to(dtype).train(training)
        assert isinstance(ours, info.module_cls)
        ours.load_state_dict(theirs.state_dict())
        if dtype in HALF:
            theirs = theirs.double()
        x = case.forward_input.args[0]

        for step in range(2):
            parameters = [(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
            for p, q in parameters:
                p.grad = q.grad = None
            compare(ours, theirs, [x], f"{what} step {step}")
            for layer, value in ((ours, x.detach()), (theirs, widened(x.detach()))):
                y = layer(value)
                if y.requires_grad:
                    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(dtype).to(y.dtype).view(y.shape))
            for p, q in parameters:
                close(p.grad, q.grad, f"{what}: parameter gradient")
            for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
                close(a, b, f"{what}: {name}", roundings=2 * step + 2)
        back = copy.deepcopy(theirs).to(dtype)
        back.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("info", [m for m in MODULES if m.module_error_inputs_func is not None], ids=lambda m: m.name)
def test_module_errors(info):
    for training in (True, False):
        for case in info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=training):
            arguments, keywords = case.module_error_input.constructor_input.args, case.module_error_input.constructor_input.kwargs
            with pytest.raises(case.error_type):
                layer = LAYERS[info.module_cls](*arguments, **keywords)
                layer(*case.module_error_input.forward_input.args)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("info", OPERATORS, ids=lambda o: o.name.split(".")[-1])
def test_operator_samples(info, dtype):
    ours, theirs = FUNCTIONS[info.name], info.op
    count = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        count += 1

        def run(function, x, *rest, keywords=sample.kwargs):
            if function is theirs:
                keywords, rest = {k: widened(v) for k, v in keywords.items()}, [widened(t) for t in rest]
            keywords = {k: v.detach().clone() if isinstance(v, torch.Tensor) and "running" in k else v for k, v in keywords.items()}
            rest = [t.detach().clone() if isinstance(t, torch.Tensor) and not t.requires_grad else t for t in rest]
            return function(x, *rest, **keywords)

        tensors = [sample.input, *sample.args]
        plain = [None if not isinstance(t, torch.Tensor) else t for t in tensors]

        def with_arguments(function, sample=sample, plain=plain):
            def call(*leaves):
                merged = [
                    leaf if given is not None else original
                    for leaf, given, original in zip(leaves, plain, [sample.input, *sample.args], strict=True)
                ]
                return run(function, *merged)

            return call

        compare(with_arguments(ours), with_arguments(theirs), plain, f"{info.name} {tuple(sample.input.shape)} {sample.kwargs}")
    assert count


@pytest.mark.parametrize("info", [o for o in OPERATORS if o.error_inputs_func is not None], ids=lambda o: o.name.split(".")[-1])
def test_operator_errors(info):
    for case in info.error_inputs("cpu"):
        sample = case.sample_input
        with pytest.raises(case.error_type):
            FUNCTIONS[info.name](sample.input, *sample.args, **sample.kwargs)
