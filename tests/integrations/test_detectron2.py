"""detectron2: it has no wheel, so the stand-ins for its get_norm, Conv2d, FrozenBatchNorm2d and LayerNorm take its place."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfused as nf
from tests.integrations.stand_ins import BasicBlock, Conv2d, get_norm

X = torch.randn(2, 32, 6, 6, generator=torch.Generator().manual_seed(1))


def shaken(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            if t.is_floating_point():
                t += 0.1 * torch.rand_like(t)
    return layer


@pytest.mark.parametrize("name", ["BN", "FrozenBN", "GN", "LN"])
@pytest.mark.parametrize("act", [None, "relu"])
def test_norms_by_detectron2s_names(name: str, act: str | None) -> None:
    theirs = shaken(get_norm(name, 32))  # type: ignore[arg-type]
    ours: Any = get_norm(pickle.loads(pickle.dumps(nf.integrations.detectron2.norm(name, act=act))), 32)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict()) and ours.eps == theirs.eps
    for training in (True, False):
        wanted = theirs.train(training)(X)
        torch.testing.assert_close(ours.train(training)(X), wanted if act is None else wanted.relu(), rtol=1e-4, atol=1e-5)
    assert name != "FrozenBN" or not list(ours.parameters())


def test_in_the_wrapper() -> None:
    """norm= and activation= of Conv2d: the activation in the norm, or both as they were, fused afterwards."""
    norm = nf.integrations.detectron2.norm("GN", act="relu", num_groups=4)
    assert repr(norm) == "norm('gn', act='relu', num_groups=4)"
    plain = Conv2d(32, 32, 3, norm=nn.GroupNorm(4, 32), activation=F.relu)
    ours = Conv2d(32, 32, 3, norm=norm(32))
    ours.load_state_dict(plain.state_dict())
    wanted = plain(X)
    torch.testing.assert_close(ours(X), wanted)
    assert [r.act for r in nf.fuse_norms(plain).rows] == ["relu"]
    torch.testing.assert_close(plain(X), wanted)


def test_blocks_and_the_freezer() -> None:
    """Activations outside the wrapper stay there, and the report has a row for every norm; FrozenBN and LN are converted."""
    for name in ("BN", "FrozenBN", "LN"):
        model = shaken(nn.Sequential(BasicBlock(32, name), BasicBlock(32, name)))
        plain = copy.deepcopy(model)
        report = nf.fuse_norms(model)
        assert len(report.converted) == 4 and not report.fused, report
        torch.testing.assert_close(model(X), plain(X), rtol=1e-4, atol=1e-4)
        nf.unfuse_norms(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    model = nn.Sequential(BasicBlock(32, nf.integrations.detectron2.norm("BN", act="silu")))
    nf.freeze_batch_norm(model)
    assert type(model[0].conv1.norm) is nf.FrozenBatchNormAct2d and type(model[0].conv1.norm.act) is nn.SiLU


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="norm: kind must be one of bn, .* got 'CycleBN'"):
        nf.integrations.detectron2.norm("CycleBN")
    with pytest.raises(ValueError, match="unknown activation 'rely'"):
        nf.integrations.detectron2.norm("BN", act="rely")
    with pytest.raises(ValueError, match=r"num_channels \(30\) must be divisible by num_groups \(32\)"):
        get_norm(nf.integrations.detectron2.norm("GN"), 30)
