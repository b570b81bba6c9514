"""Synchronized batch norm: in processes (`cases`), and what of the layer needs none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import normfused as nf

from . import cases, processes

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return processes.run(cases.__name__, tmp_path_factory.mktemp("group"))


@pytest.mark.parametrize("name", cases.CASES)
def test_in_processes(name: str, failed: dict[str, list[str]]) -> None:
    assert not failed[name], "\n".join(failed[name])


def test_without_a_group_it_is_batch_norm() -> None:
    layer, twin = nf.SyncBatchNormAct(6, act="silu"), nf.BatchNormAct2d(6, act="silu")
    x = torch.randn(3, 6, 4, 4)
    assert torch.equal(layer(x), twin(x)) and torch.equal(layer.running_var, twin.running_var)
    assert torch.equal(copy.deepcopy(layer).eval()(x), twin.eval()(x))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer.train()(x[:1, :, 0, 0])


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm, nn.BatchNorm1d, nn.BatchNorm3d])
def test_state_dict_both_ways(norm: type) -> None:
    theirs = norm(6)
    nn.init.normal_(theirs.weight)
    ours = nf.SyncBatchNormAct(6, act="relu")
    assert list(ours.state_dict()) == list(theirs.state_dict()) and ours._version == theirs._version
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight, theirs.weight)


def test_from_batch_norm() -> None:
    layer = nf.BatchNormAct2d(6, 1e-3, None, bias=False, act="prelu", residual_mode="post_act", backend="torch").double().eval()
    layer.qconfig = "a setting"
    made = nf.SyncBatchNormAct.from_batch_norm(layer, "a group")
    assert made.process_group == "a group" and made.qconfig == "a setting" and not made.training
    assert (made.eps, made.momentum, made.residual_mode, made.backend) == (1e-3, None, "post_act", "torch")
    mine, theirs = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (made, layer))
    assert mine.keys() == theirs.keys() and all(mine[n] is theirs[n] for n in mine)
    x = torch.randn(3, 6, 4, 4).double()
    assert torch.equal(made(x, x), layer(x, x))
    plain = nf.SyncBatchNormAct.from_batch_norm(nn.BatchNorm1d(6, affine=False, track_running_stats=False))
    assert plain.act is None and plain.weight is None and plain.running_mean is None and not list(plain.parameters())
    for wrong in (nn.GroupNorm(2, 6), nn.LazyBatchNorm2d()):
        with pytest.raises(TypeError, match=f"must be a batch norm of known size, got {type(wrong).__name__}"):
            nf.SyncBatchNormAct.from_batch_norm(wrong)


def test_repr() -> None:
    shown = repr(nf.SyncBatchNormAct(6, act="silu"))
    assert "SyncBatchNormAct(" in shown and "fused, act=silu" in shown
