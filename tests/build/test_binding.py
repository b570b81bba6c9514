"""The operators and the pybind11 module over placeholder kernels, on CPU tensors: shapes, types, checks, errors, arrival words."""

from __future__ import annotations

import json

import pytest

from .conftest import python

CHECK = r"""
import json, torch
from normfused.activations import Activation
from normfused.backends.cuda import _load
from normfused.problem import Problem

library = _load.library()
assert library is not None, _load.reason()
ops, cpu = library.ops, torch.device("cpu")
results, errors = {}, {}

def problem(x, scope="channel", rule="standard", groups=1, layout="nchw", act="relu", residual_mode=None):
    n, c = x.shape[:2]
    s = x.numel() // (n * c)
    return Problem(scope, rule, n, c, s, groups, layout, x.dtype, cpu, act=Activation(act), residual_mode=residual_mode)

def forward(x, p, residual=None, weight=None, counter=None, eps=1e-5):
    parameters = (residual, weight, None, None, None, None, None, counter)
    return ops.norm_act(x, *parameters, _load.pack_code(p), p.groups, eps, 0.1, 0.0, 0.0)

def backward(x, p, weight=None, mask=None, act_weight=None, mean=None, rstd=None):
    parameters = (None, mask, weight, None, act_weight, None, mean, rstd)
    return ops.norm_act_backward(x, None, x, *parameters, _load.pack_code(p), p.groups, 1e-5, 0.0, 0.0, _load.pack_needs(True, False, True))

def shapes(tensors):
    return [list(t.shape) for t in tensors]

def error(name, call):
    try:
        call()
    except RuntimeError as e:
        errors[name] = str(e)

x = torch.zeros(2, 6, 3, 5)
w = torch.ones(6, dtype=torch.bfloat16)
counter = torch.zeros((), dtype=torch.int64)
y, mean, rstd, extra = forward(x, problem(x), weight=w, counter=counter)
results["channel"] = shapes((y, mean, rstd, extra))
results["sizes"] = float(y.flatten()[0])
results["counter"] = int(counter)
results["words and scratch"] = float(rstd[0])
ops.set_limits(4, 1024, 2048, 256, pool=False)
results["exhausted pool"] = float(forward(x, problem(x), weight=w)[2][0])
results["pretended limits"] = library.interface.limits(0)
results["plan"] = library.describe(problem(x, act="silu"), "apply")
ops.set_limits(132, 232448, 233472, 2048)
results["group"] = shapes(forward(x, problem(x, "sample_group", groups=3)))
results["position rms"] = shapes(forward(x, problem(x, "position", "rms")))
results["mask"] = shapes(forward(x, problem(x, residual_mode="pre_act"), x))
results["pre_norm"] = shapes(forward(x, problem(x, "position", residual_mode="pre_norm"), x))
last = x.to(memory_format=torch.channels_last)
results["strides kept"] = forward(last, problem(last, layout="nhwc"))[0].stride() == last.stride()
results["float64"] = [str(t.dtype) for t in forward(x.double(), problem(x.double()))]
results["float16"] = [str(t.dtype) for t in forward(x.half(), problem(x.half()))]
gradients = backward(x, problem(x), w, act_weight=torch.ones(1), mean=mean, rstd=rstd)
results["gradients"] = shapes(gradients)
results["gradients' types"] = [str(t.dtype) for t in gradients]
slices = torch.zeros(2, 6)
code = _load.pack_code(problem(x, "sample_group", groups=6))
results["moments"] = shapes(ops.moments(x, code))
results["apply"] = shapes(ops.apply(x, None, slices, slices, None, None, slices, code, 0.0, 0.0, False))
results["grad_moments"] = shapes(ops.grad_moments(x, x, None, slices, slices, slices, torch.ones(6), None, x, None, code, 0.0, 0.0))
results["grad_apply"] = shapes(ops.grad_apply(x, x, None, *[slices] * 3, None, *[slices] * 3, None, None, code, 0.0, 0.0, 2))
error("dtype", lambda: forward(x.long(), problem(x)))
error("weight", lambda: forward(x, problem(x), weight=w[:4]))
error("residual", lambda: forward(x, problem(x), x[:1]))
error("counter", lambda: forward(x, problem(x), counter=torch.zeros(())))
error("moments", lambda: backward(x, problem(x), mean=mean.double(), rstd=rstd))
error("mask", lambda: backward(x, problem(x, residual_mode="pre_act"), mask=torch.zeros(3, dtype=torch.uint8), mean=mean, rstd=rstd))
error("code", lambda: ops.norm_act(x, None, None, None, None, None, None, None, None, 3, 1, 1e-5, 0.1, 0.0, 0.0))
error("not supported", lambda: forward(x, problem(x, "sample_group", groups=7)))
error("emulator", lambda: forward(x, problem(x), eps=-1.0))
print(json.dumps([results, errors]))
"""


@pytest.fixture(scope="module")
def answers(emulation, tmp_path_factory):
    return python(CHECK, cwd=tmp_path_factory.mktemp("empty"), package=emulation, NORMFUSED_EMULATE="1")


def test_outputs(answers):
    results, _ = answers
    expected = {
        "channel": [[2, 6, 3, 5], [6], [6], [0]],
        "group": [[2, 6, 3, 5], [2, 3], [2, 3], [0]],
        "position rms": [[2, 6, 3, 5], [0], [2, 15], [0]],
        "mask": [[2, 6, 3, 5], [6], [6], [45]],
        "pre_norm": [[2, 6, 3, 5], [2, 15], [2, 15], [2, 6, 3, 5]],
        "gradients": [[2, 6, 3, 5], [0], [6], [0], [1], [0]],
        "moments": [[2, 6], [2, 6]],
        "apply": [[0], [2, 6, 3, 5]],
        "grad_moments": [[2, 6], [2, 6], [6]],
        "grad_apply": [[0], [2, 6, 3, 5]],
        "sizes": 2 * 10000 + 6 * 100 + 15,
        "counter": 1,
        "strides kept": True,
        "float64": ["torch.float64"] * 4,
        "float16": ["torch.float16", "torch.float32", "torch.float32", "torch.float16"],
    }
    assert {name: results[name] for name in expected} == expected
    assert results["gradients' types"][2] == "torch.bfloat16"


def test_arrival_words_come_from_the_pool(answers):
    results, _ = answers
    assert (results["words and scratch"], results["exhausted pool"]) == (1.0, 0.0)


def test_the_module_describes_plans(answers):
    results, _ = answers
    assert results["plan"] == {
        "route": "placeholder", "step": 3, "act": 6, "processors": 4, "pool": True, "scratch_bytes": 64, "arrivals": 32
    }  # fmt: skip
    assert results["pretended limits"] == {
        "processors": 4, "shared_bytes_per_block": 1024, "shared_bytes_per_processor": 2048, "threads_per_processor": 256,
        "largest_cluster": 8, "spare_processors": 0,
    }  # fmt: skip


def test_errors_show_both_sides(answers):
    _, errors = answers
    assert errors == {
        "dtype": "norm_act: x must be float32, float16, bfloat16 or float64, got Long",
        "weight": "norm_act: weight must have 1 or 6 elements, got 4",
        "residual": "norm_act: residual must have x's 180 elements of Float, got 90 of Float",
        "counter": "norm_act: num_batches_tracked must be one value of Long, got 1 of Float",
        "moments": "norm_act_backward: mean must have 6 values of Float, got 6 of Double",
        "mask": "norm_act_backward: mask must have 45 values of Byte, got 3 of Byte",
        "code": "norm_act: code must be packed by normfused.backends.cuda._load.pack_code, got 3",
        "not supported": (
            "norm_act: the kernels have no plan for it (more than 2^32 elements of a sample normalized along dim 1, groups among 2^20 or"
            " more channels in channels_last, or 2^31 blocks); use backend='triton' or 'torch' for this call"
        ),
        "emulator": "norm_act: the emulation failed",
    }


def test_operators_load_without_the_module(emulation, tmp_path):
    """As where it was built for another Python."""
    code = """
import importlib.machinery, json
importlib.machinery.EXTENSION_SUFFIXES[:] = [".another-python.so"]
from normfused.backends.cuda import _load
library = _load.library()
print(json.dumps([library.module is None, library.interface is None, str(library.ops.norm_act.default)]))
"""
    assert python(code, cwd=tmp_path, package=emulation, NORMFUSED_EMULATE="1") == [True, True, "normfused_emulation.norm_act.default"]


def test_the_module_refuses_what_it_does_not_know(emulation, tmp_path):
    code = """
import json
from normfused.backends.cuda import _load
module = _load.library().module
errors = []
for call in (
    lambda: module.Question("forward", 24, "float32", (1, 2, 3)),
    lambda: module.Question("apply", 24, "int8", (1, 2, 3)),
    lambda: module.Question("apply", -1, "float32", (1, 2, 3)),
    lambda: module.Question("apply", 24, "float32", (1, 2, 3), limits={"cores": 3}),
):
    try:
        call()
    except ValueError as error:
        errors.append(str(error))
print(json.dumps(errors))
"""
    assert python(code, cwd=tmp_path, package=emulation, NORMFUSED_EMULATE="1") == [
        "step must be one of norm_act, norm_act_backward, moments, apply, grad_moments, grad_apply, got forward",
        "dtype must be one of float32, float16, bfloat16, float64, got int8",
        "code must be packed by pack_code, got -1",
        "limits: unknown name cores",
    ]


def test_the_record_tells_what_was_built(emulation):
    record = json.loads((emulation / "build" / "emulation" / "record.json").read_text())
    assert record["kind"] == "emulation"
    assert str(emulation) not in json.dumps(record)
