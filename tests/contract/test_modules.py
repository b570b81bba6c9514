"""What users of torch.nn's layers rely on: classes, names, checkpoints, copies, meta devices, hooks, conversion, autocast."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import normfused as nf
from normfused import functional as NF
from normfused.activations import TLU

PAIRS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "BatchNorm1d": (nf.BatchNormAct1d, nn.BatchNorm1d, (6,)),
    "BatchNorm2d": (nf.BatchNormAct2d, nn.BatchNorm2d, (6,)),
    "BatchNorm3d": (nf.BatchNormAct3d, nn.BatchNorm3d, (6,)),
    "InstanceNorm1d": (nf.InstanceNormAct1d, nn.InstanceNorm1d, (6,)),
    "InstanceNorm2d": (nf.InstanceNormAct2d, nn.InstanceNorm2d, (6,)),
    "InstanceNorm3d": (nf.InstanceNormAct3d, nn.InstanceNorm3d, (6,)),
    "GroupNorm": (nf.GroupNormAct, nn.GroupNorm, (3, 6)),
    "LayerNorm": (nf.LayerNormAct, nn.LayerNorm, (6,)),
    "RMSNorm": (nf.RMSNormAct, nn.RMSNorm, (6,)),
}
SHAPES = {name: {"1d": (3, 6, 4), "2d": (3, 6, 4, 5), "3d": (2, 6, 2, 3, 2)}.get(name[-2:], (3, 6, 4, 5)) for name in PAIRS}
SHAPES |= {"LayerNorm": (3, 5, 6), "RMSNorm": (3, 5, 6)}
every = pytest.mark.parametrize("name", PAIRS)


def _ours(name: str, **options: Any) -> Any:
    cls, _, arguments = PAIRS[name]
    return cls(*arguments, **options)


def _batch_act(**options: Any) -> nf.BatchNormAct2d:
    return nf.BatchNormAct2d(6, **options)


X = torch.randn(3, 6, 4, 5, generator=torch.Generator().manual_seed(0))


@every
def test_is_torchs_class_with_torchs_arguments(name: str) -> None:
    """isinstance is how init loops, weight-decay splits, SyncBN checks and FSDP's mixed precision find norms; order as in torch."""
    ours, theirs, _ = PAIRS[name]
    assert issubclass(ours, theirs)
    import inspect

    mine, torchs = inspect.signature(ours.__init__).parameters, inspect.signature(theirs.__init__).parameters
    positional = [n for n, p in mine.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [n for n, p in torchs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for n, p in torchs.items():
        if n in mine:
            assert mine[n].default == p.default, n
    assert all(mine[n].kind is mine[n].KEYWORD_ONLY for n in ("act", "residual_mode", "backend"))


@every
def test_state_dict_both_ways(name: str) -> None:
    ours, theirs = _ours(name), PAIRS[name][1](*PAIRS[name][2])
    for t in theirs.parameters():
        nn.init.normal_(t)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(SHAPES[name])
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    theirs.load_state_dict(ours.state_dict())
    fresh = PAIRS[name][1](*PAIRS[name][2])
    fresh.load_state_dict(_ours(name, act="relu").state_dict())
    assert ours._version == theirs._version


def test_version_1_checkpoint_without_counter() -> None:
    state = _batch_act().state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1  # type: ignore[attr-defined]
    assert _batch_act().load_state_dict(state).missing_keys == []


@every
def test_repr_says_what_it_is(name: str) -> None:
    plain = repr(_ours(name))
    acting = repr(_ours(name, act=("leaky_relu", {"negative_slope": 0.2}), residual_mode="post_act", backend="torch"))
    assert "fused" in plain and "act=" not in plain
    for part in ("act=leaky_relu(negative_slope=0.2)", "residual_mode=post_act", "backend=torch"):
        assert part in acting
    assert "composed" in repr(_ours(name, act=nn.CELU()))


@every
def test_copies_and_pickles(name: str) -> None:
    layer = _ours(name, act="prelu")
    x = torch.randn(SHAPES[name])
    layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert torch.equal(twin.eval()(x), copy.deepcopy(layer).eval()(x))
        assert all(p.data_ptr() != q.data_ptr() for p, q in zip(twin.parameters(), layer.parameters(), strict=True))


@every
def test_meta_device_and_back(name: str) -> None:
    """Deferred initialization: built and run on meta, then emptied and reset, it equals a fresh layer."""
    with torch.device("meta"):
        layer = _ours(name, act="prelu")
    y = layer(torch.empty(SHAPES[name], device="meta"))
    assert y.is_meta and y.shape == SHAPES[name]
    layer.to_empty(device="cpu")
    for t in (*layer.parameters(), *layer.buffers()):
        t.data.fill_(7)
    layer.reset_parameters()
    want = _ours(name, act="prelu").state_dict()
    for key, value in layer.state_dict().items():
        if not key.startswith("act."):
            assert torch.equal(value, want[key]), key


def test_meta_keeps_the_memory_format() -> None:
    x = torch.empty(3, 6, 4, 5, device="meta").to(memory_format=torch.channels_last)
    for layer in (nf.GroupNormAct(3, 6, device="meta"), nf.InstanceNormAct2d(6), nf.BatchNormAct2d(6, device="meta")):
        assert layer(x).stride() == x.stride(), layer


def test_update_bn_and_functorchs_replacement() -> None:
    net, plain = nn.Sequential(nf.BatchNormAct2d(6, act="relu")), nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())
    batches = [torch.randn(3, 6, 4, 5) for _ in range(3)]
    update_bn(batches, net)
    update_bn(batches, plain)
    torch.testing.assert_close(net[0].running_var, plain[0].running_var)
    assert net[0].momentum == 0.1
    from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap

    replace_all_batch_norm_modules_(net)
    assert net[0].running_mean is None
    parameters = dict(net.named_parameters())

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, p, (x,)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, torch.stack(batches))
    want = torch.autograd.grad(loss(parameters, batches[1]), parameters["0.weight"])[0]
    torch.testing.assert_close(found["0.weight"][1], want)


def test_fx_with_our_layers_as_leaves() -> None:
    from torch import fx

    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
            return type(m).__module__.startswith("normfused") or super().is_leaf_module(m, qualname)

    net = nn.Sequential(nn.Conv2d(6, 6, 1), _batch_act(act="relu"))
    traced = fx.GraphModule(net, Leaves().trace(net))
    assert torch.equal(traced.eval()(X), net.eval()(X))


def test_activation_modules_with_hooks_are_called() -> None:
    """A hook on a fused activation would never run: such a module is composed after the norm instead."""
    seen = []
    layer = _batch_act(act=nn.ReLU())
    want = layer(X)
    assert layer.act is not None
    handle = layer.act.register_forward_hook(lambda m, i, o: seen.append(o))
    assert torch.equal(layer(X), want) and len(seen) == 1 and (seen[0] >= 0).all()
    assert "composed" in repr(layer)
    handle.remove()
    layer(X)
    assert len(seen) == 1


def test_subclassed_activations_are_called() -> None:
    class Shifted(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    torch.testing.assert_close(_batch_act(act=Shifted())(X), _batch_act(act="relu")(X) + 1)


def test_the_activation_may_be_changed_later() -> None:
    layer = _batch_act(act="relu")
    for act, function in (
        (nn.SiLU(), nn.functional.silu),
        (None, lambda t: t),
        (nn.GELU("tanh"), nn.GELU("tanh")),
    ):
        layer.act = act
        torch.testing.assert_close(layer(X), function(_batch_act()(X)))
    layer.act = nn.LeakyReLU(0.1)
    layer.act.negative_slope = 0.5
    torch.testing.assert_close(layer(X), nn.functional.leaky_relu(_batch_act()(X), 0.5))


@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU(inplace=True),
        nn.PReLU(6),
        TLU(6, init=-0.3),
        nn.Softplus(2.0, 3.0),
        nn.ELU(0.7),
        nn.Hardswish(),
        nn.CELU(),
        torch.sin,
        nn.Softmax(1),
    ],
    ids=lambda act: getattr(act, "__name__", str(act)),
)
@pytest.mark.parametrize("mode", [None, "pre_act", "post_act"])
def test_any_module_or_callable_equals_the_chain(act: Any, mode: str | None, backend: str) -> None:
    residual = torch.randn(X.shape)
    layer = _batch_act(act=act, residual_mode=mode or "pre_act", backend=backend)
    z = nn.BatchNorm2d(6)(X)
    want = {None: lambda: act(z.clone()), "pre_act": lambda: act(z + residual), "post_act": lambda: act(z.clone()) + residual}[mode]()
    torch.testing.assert_close(layer(X, residual) if mode else layer(X), want, rtol=1e-5, atol=1e-5)


def test_parameters_of_activations_are_trained() -> None:
    layer = _batch_act(act="prelu")
    assert "act.weight" in layer.state_dict()
    layer(X).square().sum().backward()
    assert layer.act is not None and float(layer.act.weight.grad.abs()) > 0
    frn = nf.FilterResponseNorm2d(6, learnable_eps="channel")
    assert {k: tuple(v.shape) for k, v in frn.state_dict().items()} == dict.fromkeys(("weight", "bias", "tau", "eps_l"), (6,))


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d", "GroupNorm", "LayerNorm", "RMSNorm"])
def test_autocast_keeps_the_type(name: str, backend: str) -> None:
    """Policy "keep": bfloat16 in, bfloat16 out, also under autocast; float32 in stays float32."""
    layer = _ours(name, act="gelu", backend=backend)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(SHAPES[name]).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == dtype
        with_out = layer(x)
        assert torch.equal(y, with_out)
        assert torch.autograd.grad(y.float().sum(), x)[0].dtype == dtype


def test_no_grad_and_inference_mode_equal_training_forward(backend: str) -> None:
    layer = _batch_act(act="silu", backend=backend)
    want = layer(X).detach()
    with torch.no_grad():
        assert torch.equal(layer(X), want)
    with torch.inference_mode():
        assert torch.equal(layer(X), want)


def test_tensor_subclasses_do_not_crash(backend: str) -> None:
    class Named(Tensor):
        pass

    x = X.clone().as_subclass(Named).requires_grad_()
    y = NF.group_norm_act(x, 3, act="relu", backend=backend)
    torch.testing.assert_close(y.as_subclass(Tensor), NF.group_norm_act(X, 3, act="relu"), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == X.shape


def test_the_input_and_the_residual_are_left_alone(backend: str) -> None:
    """Kernels that reuse memory must not reuse the user's."""
    x, r = X.clone(), torch.randn(X.shape)
    kept = r.clone()
    for act in ("relu", "sigmoid", "silu", "tlu"):
        for mode in ("pre_act", "post_act"):
            for channels_last in (False, True):
                a, b = (t.to(memory_format=torch.channels_last) if channels_last else t for t in (x, r))
                for layer in (
                    nf.FilterResponseNorm2d(6, act=act, residual_mode=mode, backend=backend),
                    _batch_act(act=act, residual_mode=mode, backend=backend),
                ):
                    layer(a, b)
                    layer.eval()(a, b)
                    assert torch.equal(a, X) and torch.equal(b, kept)


def test_nothing_to_normalize_by_returns_fresh_memory() -> None:
    """Identity everywhere (eval, no affine, mean 0, variance 1 - eps) must not hand back x itself."""
    layer = nf.BatchNormAct2d(6, affine=False, act="relu").eval()
    x = X.clone()
    y = layer(x)
    y.fill_(3)
    assert torch.equal(x, X)


@pytest.mark.parametrize("act", ["relu", torch.relu, nn.ReLU()], ids=["name", "function", "module"])
def test_an_activation_set_later_is_used(act: Any, backend: str) -> None:
    """However it is kept: nn.Module registers modules only."""
    layer, plain = nf.BatchNormAct2d(6, backend=backend), nf.BatchNormAct2d(6, backend=backend)
    layer.act = act
    torch.testing.assert_close(layer(X), plain(X).relu())


@pytest.mark.parametrize("backend_name", ["torch", "reference"])
def test_selecting_a_backend(backend_name: str) -> None:
    with nf.backend(backend_name):
        assert nf.get_backend() == backend_name
        assert nf.explain(_batch_act(), X).backend == backend_name
    assert nf.get_backend() == "auto"
    nf.set_backend(backend_name)
    assert nf.explain(_batch_act(backend="torch"), X).backend == "torch"


def test_explain_does_not_move_statistics() -> None:
    layer = _batch_act(act="relu")
    before = copy.deepcopy(layer.state_dict())
    report = str(nf.explain(layer, X))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert "torch" in report and "not reference" in report
    with pytest.raises(ValueError, match="ran no operation"):
        nf.explain(nn.ReLU(), X)
    assert "the first of" not in report
    assert "the first of 2 operations" in str(nf.explain(nn.Sequential(layer, copy.deepcopy(layer)), X))
