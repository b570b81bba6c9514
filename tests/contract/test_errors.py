"""Bad input: the type torch.nn raises and the natural one, a message with both sides, and the module's state as it was."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import normfused as nf
from normfused import functional as nF

X = torch.randn(2, 4, 3, 3)
LAYERS = {
    "batch": lambda **k: nf.BatchNormAct2d(4, **k),
    "instance": lambda **k: nf.InstanceNormAct2d(4, affine=True, track_running_stats=True, **k),
    "group": lambda **k: nf.GroupNormAct(2, 4, **k),
    "layer": lambda **k: nf.LayerNormAct(3, **k),
    "layer dim=1": lambda **k: nf.LayerNormAct(4, dim=1, **k),
    "rms": lambda **k: nf.RMSNormAct(3, **k),
    "frn": lambda **k: nf.FilterResponseNorm2d(4, **k),
}


def raises_and_leaves_alone(layer, types, match, *inputs, **keywords):
    """The call raises every one of ``types`` (each a base of what is raised) and changes no parameter, buffer or mode."""
    before = copy.deepcopy(layer.state_dict())
    for kind in types:
        with pytest.raises(kind, match=match):
            layer(*inputs, **keywords)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} changed by a call that raised"


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64], ids=str)
def test_types_that_are_not_floating(make, dtype):
    name = str(dtype).removeprefix("torch.")
    raises_and_leaves_alone(
        make(), (TypeError, NotImplementedError, RuntimeError), f"float32.*got {name}", torch.ones(2, 4, 3, 3).to(dtype)
    )


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_parameters_of_another_type(make):
    layer = make()
    raises_and_leaves_alone(layer, (TypeError, RuntimeError), "must be float64 to go with the input, got float32", X.double())
    raises_and_leaves_alone(layer.half(), (TypeError, RuntimeError), "bfloat16 or float32 to go with the input, got float16", X.bfloat16())


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_residuals_that_do_not_fit(make):
    layer = make()
    raises_and_leaves_alone(layer, (ValueError, RuntimeError), r"\(2, 4, 3, 3\), got \(2, 4, 3, 1\)", X, torch.randn(2, 4, 3, 1))
    raises_and_leaves_alone(layer, (TypeError, RuntimeError), "type float32, got float64", X, X.double())
    raises_and_leaves_alone(layer, (ValueError, RuntimeError), "device cpu, got meta", X, X.to("meta"))
    raises_and_leaves_alone(layer, (TypeError,), "residual must be a Tensor", X, 1.0)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_parameters_on_another_device(make):
    layer = make().to("meta")
    with pytest.raises(RuntimeError, match="device cpu, got meta"):
        layer(X)
    with pytest.raises(ValueError, match="device cpu, got meta"):
        layer(X)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("value", [None, 1.0, [1.0, 2.0]], ids=str)
def test_not_a_tensor(make, value):
    layer = make()
    if getattr(layer, "_check_input_dim", None) is None:
        raises_and_leaves_alone(layer, (TypeError,), "input must be a Tensor", value)
    else:  # torch's own dimension check comes first, and says it in its way
        raises_and_leaves_alone(layer, (AttributeError,), "dim", value)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_unknown_names(make):
    with pytest.raises(ValueError, match=r"unknown activation 'rleu'; known: identity, relu,.*tlu"):
        make(act="rleu")
    with pytest.raises(ValueError, match=r"leaky_relu has parameters \['negative_slope'\], got \['slope'\]"):
        make(act=("leaky_relu", {"slope": 0.1}))
    with pytest.raises(TypeError, match="must be None, a name"):
        make(act=3)
    with pytest.raises(ValueError, match="unknown backend 'tritn'; known: auto, cuda, triton, torch, reference"):
        make(backend="tritn")
    with pytest.raises(ValueError, match="residual_mode must be one of pre_act, post_act.*got 'before'"):
        make(residual_mode="before")
    with pytest.raises(ValueError, match="'none' or 'tanh', got 'fast'"):
        make(act=("gelu", {"approximate": "fast"}))


@pytest.mark.parametrize("make", [
    lambda e: nf.BatchNormAct2d(4, eps=e), lambda e: nf.InstanceNormAct2d(4, eps=e), lambda e: nf.GroupNormAct(2, 4, eps=e),
    lambda e: nf.LayerNormAct(4, eps=e), lambda e: nf.RMSNormAct(4, eps=e), lambda e: nf.FilterResponseNorm2d(4, eps=e),
])  # fmt: skip
def test_negative_eps(make):
    with pytest.raises(ValueError, match="eps must be non-negative, got -1"):
        make(-1.0)


def test_eps_of_functions():
    running = torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match=r"positive in training, got 0"):
        nF.batch_norm_act(X, *running, training=True, eps=0.0)
    with pytest.raises(ValueError, match=r"non-negative, got -0.5"):
        nF.batch_norm_act(X, *running, eps=-0.5)
    nF.batch_norm_act(X, *running, eps=0.0)
    with pytest.raises(ValueError, match="eps"):
        nF.filter_response_norm(X, eps=-1.0)
    with pytest.raises(ValueError, match="eps"):
        nF.instance_norm_act(X, eps=-1.0)


@pytest.mark.parametrize(("make", "shape"), [
    (lambda: nf.BatchNormAct1d(4), (2, 4, 3, 3)), (lambda: nf.BatchNormAct2d(4), (2, 4, 3)), (lambda: nf.BatchNormAct3d(4), (2, 4, 3, 3)),
    (lambda: nf.InstanceNormAct1d(4), (2, 4, 3, 3)), (lambda: nf.InstanceNormAct2d(4), (2, 4)),
    (lambda: nf.InstanceNormAct3d(4), (2, 4, 3)),
    (lambda: nf.FilterResponseNorm1d(4), (2, 4, 3, 3)), (lambda: nf.FilterResponseNorm2d(4), (2, 4, 3)),
    (lambda: nf.FilterResponseNorm3d(4), (2, 4, 3, 3)),
])  # fmt: skip
def test_wrong_dimensionality(make, shape):
    raises_and_leaves_alone(make(), (ValueError,), rf"expected .*D.*input \(got {len(shape)}D input\)", torch.randn(shape))


def test_group_norm_needs_two_dimensions():
    raises_and_leaves_alone(nf.GroupNormAct(1, 1), (RuntimeError, ValueError), "at least 2 dimensions, got 1", torch.randn(4))


@pytest.mark.parametrize(("name", "types", "match"), [
    ("batch", (RuntimeError, ValueError), r"\(5,\) to match the input's channels, got \(4,\)"),
    ("instance", (ValueError,), r"num_features \(4\), but got: 5"),
    ("group", (RuntimeError, ValueError), "num_groups=2 and C=5"),
    ("layer dim=1", (RuntimeError, ValueError), r"number of channels 5, got \(4,\)"),
    ("frn", (RuntimeError, ValueError), r"4 channels \(dim 1\), got 5"),
])  # fmt: skip
def test_channels_that_do_not_match(name, types, match):
    raises_and_leaves_alone(LAYERS[name](), types, match, torch.randn(2, 5, 3, 3))


def test_channels_of_group_norm_that_divide_but_do_not_match():
    raises_and_leaves_alone(nf.GroupNormAct(2, 4), (RuntimeError, ValueError), r"\(6,\).*got \(4,\)", torch.randn(2, 6, 3, 3))


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_trailing_dimensions_that_do_not_match(name):
    raises_and_leaves_alone(
        LAYERS[name](), (RuntimeError, ValueError), r"normalized_shape \(3,\), got input of shape \(2, 5\)", torch.randn(2, 5)
    )
    with pytest.raises(ValueError, match=r"dim must be -1 .* or 1"):
        LAYERS[name](dim=2)


def test_instance_norm_without_affine_warns_like_torch():
    with pytest.warns(UserWarning, match="does not match num_features"):
        nf.InstanceNormAct2d(7)(X)


@pytest.mark.parametrize("make", [lambda: nf.BatchNormAct1d(4), lambda: nf.BatchNormAct1d(4, track_running_stats=False)])
def test_one_value_per_channel(make):
    raises_and_leaves_alone(make(), (ValueError,), r"Expected more than 1 value per channel when training.*\(1, 4\)", torch.randn(1, 4))
    layer = make().eval()
    if layer.running_mean is not None:
        assert layer(torch.randn(1, 4)).shape == (1, 4)


def test_one_spatial_element():
    layer = LAYERS["instance"]()
    raises_and_leaves_alone(layer, (ValueError,), "Expected more than 1 spatial element when training", torch.randn(2, 4, 1, 1))
    assert layer.eval()(torch.randn(2, 4, 1, 1)).shape == (2, 4, 1, 1)


def test_one_value_per_group():
    raises_and_leaves_alone(nf.GroupNormAct(4, 4), (ValueError,), "more than 1 value per channel", torch.randn(1, 4))
    # a*x + b with a = eps**-0.5 = 316: some 316 roundings of x away from bias = 0
    torch.testing.assert_close(nf.GroupNormAct(4, 4)(torch.randn(2, 4)), torch.zeros(2, 4), atol=1e-4, rtol=0)


def test_groups_that_do_not_divide():
    with pytest.raises(ValueError, match=r"num_channels \(4\) must be divisible by num_groups \(3\)"):
        nf.GroupNormAct(3, 4)
    for groups in (3, 0, -2):
        with pytest.raises(RuntimeError, match=f"num_groups={groups} and C=4"):
            nF.group_norm_act(X, groups)


def test_running_statistics_that_are_missing():
    for error in (RuntimeError, ValueError):
        with pytest.raises(error, match="running_mean=None and running_var=None"):
            nF.batch_norm_act(X, None, None)
        with pytest.raises(error, match="both"):
            nF.batch_norm_act(X, torch.zeros(4), None, training=True)
    with pytest.raises(ValueError, match="needs num_batches_tracked"):
        nF.batch_norm_act(X, torch.zeros(4), torch.ones(4), training=True, momentum=None)


def test_weights_of_activations():
    with pytest.raises(ValueError, match="needs act_param"):
        nF.group_norm_act(X, 2, act="prelu")
    with pytest.raises(ValueError, match=r"PReLU's weight must have 1 or 4 elements, got shape \(3,\)"):
        nF.group_norm_act(X, 2, act=nn.PReLU(3))
    with pytest.raises(ValueError, match=r"TLU's tau must have 1 or 4 elements, got shape \(5,\)"):
        nF.filter_response_norm(X, tau=torch.zeros(5))
    with pytest.raises(ValueError, match="either tau or act"):
        nF.filter_response_norm(X, tau=torch.zeros(4), act="relu")
    with pytest.raises(ValueError, match="learnable_eps must be"):
        nf.FilterResponseNorm2d(4, learnable_eps="row")


def test_pre_norm_belongs_to_layer_and_rms_norm():
    with pytest.raises(ValueError, match="pre_act, post_act, got 'pre_norm'"):
        nf.BatchNormAct2d(4, residual_mode="pre_norm")


@pytest.mark.skipif(os.environ.get("NORMFUSED_EMULATE") == "1", reason="the emulation runs CPU tensors")
def test_a_backend_that_cannot_run_raises_with_its_reason():
    layer = nf.BatchNormAct2d(4, backend="cuda")
    raises_and_leaves_alone(layer, (RuntimeError,), "'cuda' was asked for and cannot run: .*(CUDA|GPU)", X)
    with nf.backend("cuda"), pytest.raises(RuntimeError, match="cannot run"):
        nF.group_norm_act(X, 2)


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        nf.set_backend("gpu")
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        nF.group_norm_act(X, 2, backend="gpu")
    assert nf.get_backend() == "auto"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted Triton can run on the CPU")
def test_triton_on_a_cpu_tensor_says_why_not():
    with pytest.raises(RuntimeError, match=r"'triton' was asked for and cannot run: .*(CUDA tensors|not installed)"):
        nF.group_norm_act(X, 2, backend="triton")


@pytest.mark.parametrize(("value", "match"), [("gpu", "unknown backend 'gpu'"), ("cuda", "cannot run")])
def test_a_bad_environment_variable_is_found_at_the_first_use(value, match):
    program = "import torch, normfused as nf; print('imported'); nf.functional.group_norm_act(torch.randn(2, 4, 3), 2)"
    environment = {**os.environ, "NORMFUSED_BACKEND": value, "NORMFUSED_EMULATE": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode != 0
    assert "imported" in done.stdout
    assert match in done.stderr


def test_autocast_policy_name():
    with pytest.raises(ValueError, match="'keep' or 'torch', got 'fp32'"):
        nf.set_autocast_policy("fp32")


def test_what_is_no_activation():
    for act in (int, ("relu", 0.1), 3):
        with pytest.raises(TypeError, match="act: .*got"):
            nf.BatchNormAct2d(4, act=act)
    assert torch.equal(nF.group_norm_act(X, 2, act=nn.SiLU), nF.group_norm_act(X, 2, act="silu"))  # a module's class stands for its object


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_tensors_that_are_not_dense(make):
    for x in (X.to_sparse(), X.to_mkldnn()):
        raises_and_leaves_alone(make(), (ValueError, RuntimeError), f"input must be a dense tensor, got a tensor of {x.layout}", x)


def test_nested_tensors_are_jagged_ones():
    rows = [torch.randn(2, 5), torch.randn(3, 5)]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    for layer in (nf.LayerNormAct(5, act="gelu"), nf.RMSNormAct(5)):
        torch.testing.assert_close(layer(jagged).values(), layer(torch.cat(rows)))
        raises_and_leaves_alone(layer, (ValueError, RuntimeError), "got a nested tensor without", torch.nested.nested_tensor(rows))


def test_what_a_rule_returns():
    for rule, got in ((lambda mean, var: mean, "Tensor"), (lambda mean, var: (mean, var, var), "3 of them")):
        with pytest.raises(TypeError, match=f"custom_norm_act: the rule must return two tensors, scale and shift, got {got}"):
            nF.custom_norm_act(X, rule)


def test_excluded_names_are_names():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    for exclude, got in (("0", "got 0"), (["1", "norm"], r"got \['norm'\]")):
        with pytest.raises(ValueError, match=f"exclude must be names of the model's modules, {got}"):
            nf.fuse_norms(model, exclude=exclude)
    assert not any(row.now for row in nf.fuse_norms(model, exclude=iter(["0"])).rows)
