"""Converters that would drop an activation are stopped; normfused's own keep it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_conv_bn_weights

import normfused as nf
from normfused.convert.classes import sync_batch_norm_act
from tests.convert.blocks import BatchNormAct2d, FrozenBatchNorm2d, VisionBlock
from tests.convert.check import moved, near, pickled, run

X = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(fuse: bool = True) -> nn.Sequential:
    """A block with residual, a conv and norm with an activation that has a weight, one without, a layer of normfused."""
    model: Any = moved(
        nn.Sequential(
            VisionBlock(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.PReLU(4), nn.BatchNorm2d(4), nf.BatchNormAct2d(4, act="tanh")
        )
    )
    if fuse:
        nf.fuse_norms(model)
    return model


# --------------------------------------------------------------------------------------------------------- guards
def test_torchs_sync_converter_is_stopped() -> None:
    with pytest.raises(RuntimeError, match=r"drop its fused activation relu; use normfused.convert_sync_batchnorm\(model\) instead"):
        nn.SyncBatchNorm.convert_sync_batchnorm(network())
    with pytest.raises(RuntimeError, match="drop its fused activation Tanh"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nf.BatchNormAct2d(4, act="tanh"))
    nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nf.BatchNormAct2d(4), nn.BatchNorm2d(4)))
    model = network()
    nf.unfuse_norms(model)
    del model[5]
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with nf.allow_lossy_conversion():
        lost = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert type(lost[5]) is nn.SyncBatchNorm
    with pytest.raises(RuntimeError):
        nn.SyncBatchNorm.convert_sync_batchnorm(network())


@pytest.mark.parametrize("new", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Identity(), FrozenBatchNorm2d(4)], ids=repr)
def test_replacing_one_by_hand_is_stopped(new: nn.Module) -> None:
    model = network()
    for index in (2, 5):
        with pytest.raises(RuntimeError, match=f"by a {type(new).__name__} would silently drop its fused activation"):
            model[index] = new
    assert isinstance(model[2], nf.BatchNormAct2d)
    model[4] = new  # had none
    model[2] = nf.GroupNormAct(2, 4, act="prelu")
    model[5] = nn.Conv2d(4, 4, 1)
    with nf.allow_lossy_conversion():
        model[2] = nn.GroupNorm(2, 4)


def test_what_is_no_loss_is_let_through() -> None:
    model = nn.Sequential(nf.BatchNormAct2d(4, act=nn.Identity()), nf.FilterResponseNorm2d(4), nn.BatchNorm2d(4))
    model[0] = nn.BatchNorm2d(4)
    model[2] = nn.Identity()
    with pytest.raises(RuntimeError, match="activation tlu"):
        model[1] = nn.BatchNorm2d(4)
    copy.deepcopy(network()), pickled(network())
    timms = BatchNormAct2d(4, nn.ReLU())
    timms.act = nn.SiLU()
    model[1] = nf.BatchNormAct2d(4)


def test_torchs_folding_is_stopped() -> None:
    conv, norm = nn.Conv2d(4, 4, 1).eval(), nf.BatchNormAct2d(4, act="silu").eval()
    for fold in (fuse_conv_bn_eval, torch.nn.utils.fusion.fuse_conv_bn_eval):
        with pytest.raises(RuntimeError, match=r"drop its fused activation silu; use normfused.fuse_conv_norm_eval\(conv, norm\)"):
            fold(conv, norm)
    fuse_conv_bn_eval(conv, nf.BatchNormAct2d(4).eval())
    with nf.allow_lossy_conversion():
        fuse_conv_bn_eval(conv, norm)
    with pytest.raises((NotImplementedError, AssertionError)):
        torch.ao.quantization.fuse_modules(network().eval()[1:4], [["1", "2", "3"]])


# ------------------------------------------------------------------------------------------------------------ sync
@pytest.mark.skipif(sync_batch_norm_act() is None, reason="this build has no SyncBatchNormAct")
def test_synchronized_norms_keep_their_activations() -> None:
    target: Any = sync_batch_norm_act()
    for model in (network(), network(False), moved(nn.Sequential(BatchNormAct2d(4, nn.ReLU())))):
        plain = copy.deepcopy(model)
        tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
        assert nf.convert_sync_batchnorm(model) is model
        assert all(type(m) is target for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        assert tensors == [id(t) for t in (*model.parameters(), *model.buffers())]
        assert list(model.state_dict()) == list(plain.state_dict())
        for training in (True, False):
            near(run(model.train(training), (X,)), run(plain.train(training), (X,)))
        near(run(copy.deepcopy(model), (X,)), run(plain, (X,)))
        nf.convert_sync_batchnorm(model)
    model = network()
    nf.convert_sync_batchnorm(model)
    nf.unfuse_norms(model)
    assert [type(m) for m in model][2:5] == [nn.SyncBatchNorm, nn.PReLU, nn.SyncBatchNorm] and type(model[0]) is VisionBlock
    assert len(nf.fuse_norms(model).fused) == 4


# ---------------------------------------------------------------------------------------------------------- freezing
def test_frozen_norms_keep_their_activations() -> None:
    for fuse in (True, False):
        model = network(fuse)
        plain = copy.deepcopy(model).eval()
        old = dict(model.named_parameters())
        assert nf.freeze_batch_norm(model) is model
        frozen = [m for m in model.modules() if isinstance(m, nf.FrozenBatchNormAct2d)]
        assert len(frozen) == 6 and all(not list(m.parameters(recurse=False)) for m in frozen)
        assert set(model.state_dict()) == {k for k in plain.state_dict() if not k.endswith("num_batches_tracked")}
        x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
        near(run(model.train(), (x,)), run(plain, (y,)))
        for m, t in ((model, x), (plain, y)):
            m(t).square().sum().backward()
        near(x.grad, y.grad)
        near(run(copy.deepcopy(model), (X,)), run(plain, (X,)))
        with torch.no_grad():
            for p in old.values():
                p += 1 if p.dim() == 1 else 0
        model.load_state_dict(plain.state_dict())  # a batch norm's state fits
        near(run(model, (X,)), run(plain, (X,)))
        if fuse:
            nf.unfuse_norms(model)
            assert type(model[0]) is VisionBlock and model[2].act is None and type(model[2]) is nf.FrozenBatchNormAct2d
            near(run(model, (X,)), run(plain, (X,)))


def test_frozen_norms_of_other_dimensions_and_refusals() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), BatchNormAct2d(4, nn.ReLU()), nn.BatchNorm3d(4))
    wanted = copy.deepcopy(model[1]).eval()(X.float())
    nf.freeze_batch_norm(model)
    assert [type(m) for m in model] == [nf.FrozenBatchNormAct1d, nf.FrozenBatchNormAct2d, nf.FrozenBatchNormAct3d]
    torch.testing.assert_close(model[1](X.float()), wanted)
    bad = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="freeze_batch_norm: 1 must have running statistics"):
        nf.freeze_batch_norm(bad)
    assert type(bad[0]) is nn.BatchNorm2d

    class Mine(nn.BatchNorm2d):
        pass

    with pytest.warns(UserWarning, match="0 stays as it is: a subclass of nn.BatchNorm2d"):
        nf.freeze_batch_norm(nn.Sequential(Mine(4)))

    class Own(nf.BatchNormAct2d):
        """A norm of normfused with a rule of its own."""

    with pytest.warns(UserWarning, match="0 stays as it is: is normfused's already"):
        assert type(nf.freeze_batch_norm(nn.Sequential(Own(4)))[0]) is Own  # type: ignore[index]
    with pytest.raises(TypeError, match="must be of a known class"):
        nf.fuse_conv_norm_eval(nn.Conv2d(4, 4, 1).eval(), Own(4).eval())


def test_frozen_layer_itself() -> None:
    layer = nf.FrozenBatchNormAct2d(4, act="relu")
    torch.testing.assert_close(layer(X.float()), X.float().relu())
    assert list(layer.state_dict()) == ["weight", "bias", "running_mean", "running_var"] and "act=relu" in repr(layer)
    assert torch.equal(layer.running_var, torch.full((4,), 1 - 1e-5)) and layer.eps == 1e-5
    theirs = moved(FrozenBatchNorm2d(4))
    layer = nf.FrozenBatchNormAct2d(4, dtype=torch.float64, act="silu", residual_mode="pre_act")
    layer.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(layer.state_dict())
    r = torch.randn_like(X)
    near(layer(X, r), nn.functional.silu(theirs(X) + r))
    assert torch.autograd.gradcheck(
        lambda x, q: layer(x, q), (X[:1, :, :2, :2].clone().requires_grad_(), r[:1, :, :2, :2].clone().requires_grad_())
    )
    old = nn.BatchNorm2d(4).state_dict()
    for key in ("running_mean", "running_var"):
        del old[key]
    old._metadata[""]["version"] = 1  # type: ignore[attr-defined]
    assert nf.FrozenBatchNormAct2d(4).load_state_dict(old).missing_keys == []
    with pytest.raises(ValueError, match=r"FrozenBatchNormAct2d: expected 4D input \(got 3D input\)"):
        layer(X[0])
    near(torch.compile(layer, backend="aot_eager", fullgraph=True)(X, r), layer(X, r))
    half = nf.FrozenBatchNormAct2d(4).half()
    assert half(X.half()).dtype == torch.float16 and pickled(half)(X.half()).dtype == torch.float16


# ---------------------------------------------------------------------------------------------------------- folding
def _conv(kind: str) -> nn.Module:
    options: dict[str, Any] = {"groups": 2, "bias": "bias" in kind}
    if "1d" in kind:
        return nn.Conv1d(4, 6, 3, **options)
    return nn.ConvTranspose2d(4, 6, 3, stride=2, **options) if "transposed" in kind else nn.Conv2d(4, 6, 3, **options)


@pytest.mark.parametrize("kind", ["2d", "2d bias", "1d bias", "transposed", "transposed bias"])
@pytest.mark.parametrize("act", [None, "silu", "prelu"])
def test_folded_norms_keep_their_activations(kind: str, act: str | None) -> None:
    cls = nf.BatchNormAct1d if "1d" in kind else nf.BatchNormAct2d
    conv, norm = moved(_conv(kind)).eval(), moved(cls(6, act=act)).eval()
    x = X[:, :, 0] if "1d" in kind else X
    before = copy.deepcopy(conv.state_dict())
    fused = nf.fuse_conv_norm_eval(conv, norm)
    near(fused(x), norm(conv(x)))
    assert all(torch.equal(v, conv.state_dict()[k]) for k, v in before.items())
    assert isinstance(fused, nn.Sequential) is (act is not None) and not fused.training
    if act is None and "transposed" not in kind:
        weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        near([fused.weight, fused.bias], [weight, bias])


def test_folding_what_was_converted_or_is_plain() -> None:
    model = network().eval()
    near(nf.fuse_conv_norm_eval(model[1], model[2])(X), model[3](model[2](model[1](X))))
    conv = moved(nn.Conv2d(4, 4, 1)).eval()
    for norm in (
        moved(nn.BatchNorm2d(4, affine=False)).eval(),
        moved(nf.FrozenBatchNormAct2d(4, act="relu")),
        moved(BatchNormAct2d(4, nn.SiLU())).eval(),
    ):
        near(nf.fuse_conv_norm_eval(conv, norm)(X), norm(conv(X)))


@pytest.mark.parametrize(
    ("conv", "norm", "error", "message"),
    [
        (nn.Linear(4, 4), nn.BatchNorm2d(4), TypeError, "conv must be a convolution"),
        (nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), TypeError, "norm must be a batch norm"),
        (nn.Conv2d(4, 4, 1).train(), nn.BatchNorm2d(4), ValueError, "in evaluation, got conv.training=True"),
        (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), ValueError, "must have running statistics"),
        (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(5), ValueError, "must have the convolution's 4 channels, got 5"),
    ],
)
def test_folding_refuses(conv: nn.Module, norm: nn.Module, error: Any, message: str) -> None:
    if "conv.training" not in message:
        conv.eval(), norm.eval()
    with pytest.raises(error, match=f"fuse_conv_norm_eval: .*{message}"):
        nf.fuse_conv_norm_eval(conv, norm)


def test_no_warning_where_nothing_is_left_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nf.freeze_batch_norm(network())
    y: Tensor = network()(X)
    assert y.shape == X.shape
