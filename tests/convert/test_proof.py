"""What is not proven is not fused: networks in which something else sees the norm's output, and ways of writing the same thing."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normfused as nf
from tests.convert.blocks import FunctionalBlock, TimmBlock, VisionBlock, of
from tests.convert.check import moved, run, same_after_conversion

X = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.act, self.other, self.flag = nn.SiLU(), nn.Tanh(), True
        self.none: Any = None


@functools.cache
def method(function: Any) -> Any:
    """A block whose forward is ``function``."""
    return of(__name__)(type(f"Block_{function.__name__}", (Block,), {"forward": function}))


def silu(self: Any, x: Tensor) -> Tensor:
    x = self.norm(self.conv(x))
    return self.act(x)


def output_also_returned(self: Any, x: Tensor) -> Tensor:
    y = self.norm(x)
    z = self.act(y)
    return z + y


def output_kept(self: Any, x: Tensor) -> list[Tensor]:
    y = self.norm(x)
    kept = [y]
    y = self.act(y)
    return [*kept, y]


def in_training_only(self: Any, x: Tensor) -> Tensor:
    y = self.norm(x)
    if self.training:
        y = self.act(y)
    return y


def by_size(self: Any, x: Tensor) -> Tensor:
    y = self.norm(x)
    if x.shape[1] > 3:
        y = self.act(y)
    return y


def different_activations(self: Any, x: Tensor) -> Tensor:
    return self.act(self.norm(x)) + self.other(self.norm(x))


def once_without(self: Any, x: Tensor) -> Tensor:
    return self.act(self.norm(x)) + self.norm(x)


def in_a_loop(self: Any, x: Tensor) -> Tensor:
    y, total = x, x
    for _ in range(2):
        total = total + y
        y = self.norm(y)
        z = F.silu(y)
        total = total + z
    return total


def act_of_half(self: Any, x: Tensor) -> Tensor:
    y = self.norm(x)
    y = self.act(y[:, :2])
    return y


def with_a_method(self: Any, x: Tensor) -> Tensor:
    y = self.norm.forward(x)
    return self.act(y)


def by_name(self: Any, x: Tensor) -> Tensor:
    norm = self.norm
    return self.act(norm(x))


def early_return(self: Any, x: Tensor) -> Tensor:
    y = self.norm(x)
    if x.shape[0] > 5:
        return x
    y = y + x
    return F.relu(y)


def closure(self: Any, x: Tensor) -> Tensor:
    y = self.norm(x)
    look = lambda: y.sum()  # noqa: E731
    y = F.relu(y)
    return y * look()


def own_functions(self: Any, x: Tensor) -> Tensor:
    def relu(t: Tensor) -> Tensor:
        return t * 2

    return relu(self.norm(x))


def shifted_relu(x: Tensor) -> Tensor:
    return x + 1


def other_arguments(self: Any, x: Tensor) -> Tensor:
    slope = 0.25
    return F.leaky_relu(self.norm(x), slope) + F.softplus(self.norm2(x), beta=slope)


@pytest.mark.parametrize(
    "function",
    [
        output_also_returned, output_kept, in_training_only, by_size, different_activations, once_without, in_a_loop, act_of_half,
        with_a_method, by_name, early_return, closure, own_functions, other_arguments,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_left_alone(function: Any) -> None:
    report = same_after_conversion(moved(method(function)()), X, compiled=False, exported=False)
    assert all(r.now and not r.act for r in report.rows), report


def moves_past_the_shortcut(self: Any, x: Tensor) -> Tensor:
    y = self.norm(self.conv(x))
    x = self.norm2(x)
    if x.shape[1] > 3:
        x = x + 1
    y = x + y
    return self.act(y)


def argument_is_changed_between(self: Any, x: Tensor) -> Tensor:
    y = self.norm(x)
    x = self.conv(x)
    y += x
    return self.act(y)


def new_name(self: Any, x: Tensor) -> Tensor:
    y = self.norm(x)
    z = y + x
    z = self.act(z)
    return z


def broadcast(self: Any, x: Tensor) -> Tensor:
    y = self.norm(x)
    y = y + x.mean((2, 3), keepdim=True)
    return torch.relu(y)


def number(self: Any, x: Tensor) -> Tensor:
    return F.relu6(self.norm(x) + 0.5)


def other_type(self: Any, x: Tensor) -> Tensor:
    return F.elu(self.norm(x) + x.float(), 0.7)


def decided_branches(self: Any, x: Tensor) -> Tensor:
    y = self.norm(x)
    if self.none is not None:
        y = self.none(y)
    elif not self.flag:
        y = y * 2
    if self.flag and self.other is not None:
        y = self.act(y)
    return y


def methods(self: Any, x: Tensor) -> Tensor:
    return self.norm(x).relu_() + self.norm2(x).sigmoid()


def with_numbers(self: Any, x: Tensor) -> Tensor:
    return F.leaky_relu(self.norm(x), 0.2, True) + F.gelu(self.norm2(x), approximate="tanh")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (silu, "silu -"), (moves_past_the_shortcut, "silu+ -"), (argument_is_changed_between, "silu+ -"), (new_name, "silu+ -"),
        (broadcast, "relu+ -"), (number, "relu6+ -"), (other_type, "elu(alpha=0.7)+ -"), (decided_branches, "silu -"),
        (methods, "relu sigmoid"),
        (with_numbers, "leaky_relu(negative_slope=0.2) gelu_tanh"),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)  # fmt: skip
def test_fused(function: Any, expected: str) -> None:
    report = same_after_conversion(moved(method(function)()), X, exported=False)
    assert " ".join((r.act or "-") + "+" * r.residual for r in report.rows) == expected, report


# --------------------------------------------------------------------------------------------------- who else is there
class Taps(nn.Module):
    """A perceptual loss: the layers of a Sequential one by one, some of them observed."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.SiLU())

    def forward(self, x: Tensor) -> list[Tensor]:
        seen = []
        for layer in self.features:
            x = layer(x)
            seen.append(x)
        return seen


class FromOutside(nn.Module):
    """Calls the layers of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = method(silu)()

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.backbone(x), self.backbone.norm(x)]


class Twice(nn.Module):
    """One norm with and without the activation, one activation after a norm and without."""

    def __init__(self) -> None:
        super().__init__()
        norm, act = nn.BatchNorm2d(4), nn.SiLU()
        self.a, self.b, self.c = nn.Sequential(norm, act), nn.Sequential(norm), nn.Sequential(nn.BatchNorm2d(4), act)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x)


@pytest.mark.parametrize("cls", [Taps, FromOutside, Twice])
def test_others_that_see_it(cls: Any) -> None:
    report = same_after_conversion(moved(cls()), X)
    assert not report.fused and any("no activation fused" in r.note for r in report.rows), report


class Listed(nn.Module):
    """Norms in a list, as people write loops."""

    def __init__(self) -> None:
        super().__init__()
        self.norms, self.act = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)]), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = self.act(norm(x))
        return x


class InABranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.training:
            y = F.relu(y)
        return y


def looks(module: nn.Module, args: Any) -> None:
    """A hook."""


def hooked(model: Any, act: str = "act") -> Any:
    getattr(model, act).register_forward_pre_hook(looks)
    return model


REASONS = {
    "a list": (Listed, "what is called through a ModuleList is not read"),
    "a branch": (InABranch, "what follows is in a branch or a loop"),
    "a hook": (lambda: hooked(method(silu)()), "the SiLU after it has a hook"),
    "a hook behind an add": (lambda: hooked(TimmBlock(4), "act2"), "the ReLU after it has a hook"),
    "a hook in a Sequential": (lambda: hooked(nn.Sequential(nn.BatchNorm2d(4), nn.SiLU()), "1"), "the SiLU after it has a hook"),
}


@pytest.mark.parametrize("case", REASONS)
def test_the_report_says_what_hides_the_activation(case: str) -> None:
    make, reason = REASONS[case]
    report = same_after_conversion(moved(make()), X)
    assert {r.note for r in report.rows if not r.act and r.name != "norm2"} == {f"no activation fused: {reason}"}, report


def test_a_norm_shared_whole_is_converted_once() -> None:
    block = nn.Sequential(nn.BatchNorm2d(4), nn.SiLU())
    report = same_after_conversion(moved(nn.Sequential(block, nn.Conv2d(4, 4, 1), block)), X)
    assert [r.act for r in report.rows] == ["silu"]


def test_hooks_see_what_they_saw() -> None:
    """A hook on the norm, or on the activation, keeps the two apart; one on the block does not."""
    for index, fused in ((0, False), (1, False), (None, True)):
        model = moved(nn.Sequential(nn.BatchNorm2d(4), nn.SiLU()))
        seen: list[Tensor] = []
        target = model if index is None else model[index]
        target.register_forward_hook(lambda m, i, o, seen=seen: seen.extend((i[0].clone(), o.clone())))
        target.register_forward_pre_hook(lambda m, i: None)
        before = [run(model, (X,)), *seen]
        seen.clear()
        report = nf.fuse_norms(model)
        after = [run(model, (X,)), *seen]
        assert bool(report.fused) is fused and len(before) == 3
        torch.testing.assert_close(after, before)
    model = moved(nn.Sequential(nn.BatchNorm2d(4), nn.SiLU()))
    model[0].register_full_backward_hook(lambda m, gi, go: None)
    assert not nf.fuse_norms(model).fused


def decorated(function: Any) -> Any:
    @functools.wraps(function)
    def inner(self: Any, x: Tensor) -> Tensor:
        y: Tensor = function(self, x) * 2
        return y

    return inner


class Decorated(Block):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


class Extended(FunctionalBlock):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bn1(x)


def test_code_that_cannot_be_rewritten() -> None:
    assert not same_after_conversion(moved(Decorated()), X).fused
    assert [r.act for r in same_after_conversion(moved(Extended(4)), X).rows] == ["", "", ""]


def test_no_activation_and_no_residual_on_request() -> None:
    assert not same_after_conversion(moved(VisionBlock(4)), X, acts=None).fused
    assert [r.act for r in same_after_conversion(moved(TimmBlock(4)), X, residual=False).rows] == ["relu", ""]
    assert [r.act for r in same_after_conversion(moved(VisionBlock(4)), X, acts=["silu"]).rows] == [""] * 3
    assert [r.now for r in same_after_conversion(moved(VisionBlock(4)), X, kinds=["gn"]).rows] == [""] * 3
    assert [bool(r.now) for r in same_after_conversion(moved(VisionBlock(4)), X, exclude=["bn2"]).rows] == [True, False, True]


# ------------------------------------------------------------------------------------------------------------ graphs
def test_graph_modules_and_code_without_source() -> None:
    model = moved(nn.Sequential(method(silu)(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Identity(), nn.PReLU(4)))
    traced = torch.fx.symbolic_trace(model)
    assert [r.act for r in same_after_conversion(traced, X, exported=False).rows] == ["silu", "prelu"]

    for text, expected in (
        ("def forward(self, x):\n return self.act(self.norm(self.conv(x)))", "silu"),
        ("def forward(self, x):\n return self.act(self.norm(x)) + self.act(x)", ""),
        ("def forward(self, x):\n y = self.norm(x)\n return y + self.act(y)", ""),
        ("def forward(self, x):\n y = self.norm(x)\n return self.act(y) if self.training else y", ""),
        ("def forward(self, x, y=None):\n y = self.norm(x)\n return self.act(y)", ""),
        ("def forward(self, x):\n self.kept = self.norm(x)\n return self.act(self.kept)", ""),
    ):
        space: dict[str, Any] = {}
        exec(compile(text, "<nowhere>", "exec"), space)
        unreadable = type("Unreadable", (Block,), {"forward": space["forward"], "__module__": __name__})
        block = moved(unreadable())
        wanted = run(block, (X,))
        report = nf.fuse_norms(block)
        assert report.rows[0].act == expected, text
        torch.testing.assert_close(run(block, (X,)), wanted)
