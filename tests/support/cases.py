"""A case is one call of the backend, forward and backward, beside the reference in float64 from the same rounded inputs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from normfused.activations import ACTIVATIONS, activate, parse
from normfused.backends import reference
from normfused.backends.reference.grad_moments import activation_gradient, grad_moments
from normfused.backends.reference.rules import batch_instance, standard
from normfused.backends.reference.views import ncs, over_channels, over_set
from normfused.problem import BATCH_INSTANCE, CHANNEL, NHWC, POSITION, PRE_NORM, RENORM, RMS, SAMPLE_GROUP, STANDARD, Problem, dense

# methods.md 11, relative to the largest value of the reference
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
PARAMETER_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}


@dataclass
class Case:
    scope: str
    rule: str = STANDARD
    shape: tuple[int, ...] = (2, 6, 5, 3)
    groups: int = 1
    layout: str = "nchw"
    dtype: torch.dtype = torch.float32
    act: Any = None
    residual: str | None = None
    route: str | None = None
    limits: Any = None
    weight: bool = True
    bias: bool = True
    half_parameters: bool = False
    shared_act_weight: bool = False
    rule_weights: int = 0
    tracked: bool = False
    momentum: float | None = 0.1
    batch_statistics: bool = True
    device: Any = "cpu"
    seed: int = 0
    scale: float = 1.0
    mean: float = 0.0
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        make = torch.Generator().manual_seed(self.seed)
        C = self.shape[1]
        S = 1
        for size in self.shape[2:]:
            S *= size

        def normal(shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0, mean: float = 0.0) -> Tensor:
            values = torch.randn(shape, generator=make, dtype=torch.float64) * scale + mean
            values = values.to(dtype).to(self.device)
            return dense(values, NHWC) if self.layout == NHWC and len(shape) > 2 else values

        act = parse(self.act)
        self.p = Problem(
            self.scope, self.rule, self.shape[0], C, S, self.groups, self.layout, self.dtype, torch.device(self.device),
            1e-5, self.momentum, self.batch_statistics, act, self.residual,
        )  # fmt: skip
        kept = self.dtype if self.half_parameters else self.p.accumulate
        self.x = normal(self.shape, self.dtype, self.scale, self.mean)
        self.r = normal(self.shape, self.dtype) if self.residual else None
        self.dy = normal(self.shape, self.dtype)
        self.dh = normal(self.shape, self.dtype) if self.residual == PRE_NORM else None
        self.w = normal((C,), kept) if self.weight else None
        self.b = normal((C,), kept) if self.bias else None
        self.aw = normal((1 if self.shared_act_weight else C,), kept, 0.4) if act.takes_weight else None
        self.rw = normal((self.rule_weights,), kept) if self.rule_weights else None
        self.running = (None, None, None)
        if self.tracked:
            self.running = (normal((C,), kept), normal((C,), kept).abs() + 0.5, torch.tensor(4, device=self.device))

    @property
    def bounds(self) -> tuple[Any, ...]:
        """r_max and d_max, as an argument of the forward; none of the other rules. Of some channels they clamp, of others not."""
        if self.rule != RENORM:
            return ()
        return (tuple(torch.tensor(v, dtype=self.p.accumulate, device=self.device) for v in (1.4, 0.6)),)

    # ------------------------------------------------------------------------------------------------------- the runs
    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(y, mean, rstd, h), by the backend that a subclass tests."""
        raise NotImplementedError

    def backward(
        self, y: Tensor, mean: Tensor, rstd: Tensor, h: Tensor | None, needs: tuple[bool, bool, bool] = (True, True, True)
    ) -> tuple[Tensor | None, ...]:
        raise NotImplementedError

    def check(self) -> None:
        """Fails where an error is above its tolerance."""
        wrong = {name: f"{error:.3g}" for name, error in self.errors().items() if not error <= 1}
        assert not wrong, f"error / tolerance {wrong} in {self}"

    def errors(self) -> dict[str, float]:
        """Largest errors relative to the tolerances, by name."""
        running = [None if t is None else t.clone() for t in self.running]
        out = self.forward()
        gradients = self.backward(*out)
        y, mean, rstd, h = out
        p = replace(self.p, dtype=torch.float64, residual_mode=None if h is not None else self.residual)
        x, r = _double(self.x if h is None else h), None if h is not None else _double(self.r)
        if h is not None:
            assert self.r is not None
            assert torch.equal(h, (self.x.double() + self.r.double()).to(self.dtype)), "h is x + residual, rounded once"
            assert h.stride() == self.x.stride()
        wide = [_double(t) for t in (self.w, self.b, self.aw, self.rw)]
        buffers = [_double(t) for t in running]
        expected = reference.norm_act(p, x, r, *wide, *buffers, *self.bounds)
        source = {None: None, "y": y.double() if self.p.z_source == "y" else expected[0], "residual": r}[p.z_source]
        statistics = expected[1], expected[2]
        dy = self.dy.double()
        expected_gradients = reference.norm_act_backward(p, dy, _double(self.dh), x, source, *wide, *statistics, (True, True, True))
        found = _Errors(self.dtype)
        found.add("y", y, expected[0])
        # a mean near zero is as accurate as the numbers it is of
        per_set = expected[2][0] if self.rule == RENORM else expected[2]
        found.add("mean", mean, expected[1], parameter=True, scale=_larger(expected[1], 1 / per_set))
        found.add("rstd", rstd, expected[2], parameter=True)
        names = ("running_mean", "running_var", "num_batches_tracked")
        for name, got, want in zip(names, self.running, buffers, strict=True):
            found.add(name, got, want, parameter=True)
        found.add("dx", gradients[0], expected_gradients[0], scale=self._dx_scale(p, dy, x, source, wide, (expected[1], per_set)))
        if self.residual in ("pre_act", "post_act"):
            found.add("dresidual", gradients[1], expected_gradients[1])
        for name, got, want in zip(("dweight", "dbias", "dact", "drule"), gradients[2:], expected_gradients[2:], strict=True):
            scale = self._parameter_scale(dy, want)
            if name == "drule" and p.rule == BATCH_INSTANCE:
                scale = max(scale, self._gate_scale(p, dy, x, source, wide, *statistics))
            found.add(name, got, want, parameter=True, scale=scale)
        return found.errors

    def _gate_scale(self, p: Problem, dy: Tensor, x: Tensor, source: Tensor | None, wide: list[Any], mean: Tensor, rstd: Tensor) -> float:
        """The gate's gradient is the weight's by the batch's statistics less the weight's by the samples', which all but cancel; and means
        are saved rounded."""
        centre, a, b = (t.unsqueeze(2) for t in batch_instance.coefficients(p, mean, rstd, wide[3], wide[0], wide[1]))
        dz, _ = activation_gradient(p, dy, x, source, centre, a, b, wide[2])
        sum_dz, sum_dz_xc = grad_moments(p, dz, x, centre)
        of_batch, of_samples = rstd[0] * (sum_dz_xc + (mean[1:] - mean[0]) * sum_dz), rstd[1:] * sum_dz_xc
        terms = of_batch.abs() + of_samples.abs() + (rstd[1:] * mean[1:] * sum_dz).abs()
        return 0.1 * _larger(terms.sum(0) * (1 if wide[0] is None else wide[0]))

    def _dx_scale(self, p: Problem, dy: Tensor, x: Tensor, source: Tensor | None, wide: list[Any], statistics: Any) -> float:
        """max|dz_scale*dz|: with few elements to a set dx itself cancels."""
        if p.rule == BATCH_INSTANCE:
            centre, a, b = (t.unsqueeze(2) for t in batch_instance.coefficients(p, *statistics, wide[3], wide[0], wide[1]))
            # the gate's two shares may cancel; what is rounded are the terms
            per_slice = statistics[1][0] * wide[3].abs() + (1 - wide[3]).abs() * statistics[1][1:]
            factor = per_slice.unsqueeze(2) * over_channels(p, wide[0], 1.0)
        else:
            centre, a, b = standard.coefficients(p, *statistics, wide[0], wide[1])
            factor = over_set(p, statistics[1]) * over_channels(p, wide[0], 1.0)
        dz, _ = activation_gradient(p, dy, x, source, centre, a, b, wide[2])
        scale = (dz * factor).abs().max()
        if self.dh is not None:
            scale = scale + self.dh.abs().max()
        return float(scale)

    def _parameter_scale(self, dy: Tensor, want: Tensor | None) -> float:
        # a sum of few terms that cancel is as accurate as its terms, not as itself
        return max(float(want.abs().max()), float(dy.abs().max())) if want is not None else 1.0


def _larger(*tensors: Tensor) -> float:
    return max((float(t.abs().max()) for t in tensors if t.numel()), default=1.0)


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double() if t.is_floating_point() else t.clone()


class _Errors:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.errors = dtype, {}

    def add(self, name: str, got: Tensor | None, want: Tensor | None, *, parameter: bool = False, scale: float | None = None) -> None:
        if got is None or want is None:
            assert got is None, f"{name}: {got} where the reference has none"
            assert want is None, f"{name}: missing"
            return
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        if not got.numel():
            return
        if not got.is_floating_point():
            assert torch.equal(got, want), name
            return
        # a parameter's gradient has the parameter's type
        tolerance = max(PARAMETER_TOLERANCE[self.dtype], TOLERANCE[got.dtype]) if parameter else TOLERANCE[self.dtype]
        difference = (got.double() - want).abs().max()
        size = max(float(want.abs().max()), 1e-300) if scale is None else max(scale, 1e-300)
        error = float(difference) / size
        self.errors[name] = (error if error == error else float("inf")) / tolerance
        if torch.isnan(want).any():
            self.errors[name] = 0.0 if torch.equal(torch.isnan(want), torch.isnan(got)) else float("inf")


# ------------------------------------------------------------------------------------------------------------ coverage
def pairwise(factors: dict[str, Sequence[Any]], allowed: Any, seed: int = 0) -> list[dict[str, Any]]:
    """Few rows such that every two values of different factors that may meet do meet in one; greedy, always the same rows."""
    choose = random.Random(seed)
    names = list(factors)

    def pairs_of(row: dict[str, Any]) -> Iterable[Any]:
        return itertools.combinations([(n, factors[n].index(row[n])) for n in names], 2)

    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(factors[a])), range(len(factors[b])))
    }
    rows: list[dict[str, Any]] = []
    while missing:
        (a, i), (b, j) = min(missing)
        best, gain = None, 0
        for _ in range(60):
            row = {n: choose.choice(factors[n]) for n in names}
            row[a], row[b] = factors[a][i], factors[b][j]
            if not allowed(row):
                continue
            new = sum(pair in missing for pair in pairs_of(row))
            if new > gain:
                best, gain = row, new
        if best is None:  # the pair is not allowed with anything
            missing.discard(((a, i), (b, j)))
            continue
        rows.append(best)
        missing.difference_update(pairs_of(best))
    return rows


def covering(factors: dict[str, Sequence[Any]], allowed: Any = lambda row: True, **options: Any) -> pytest.MarkDecorator:
    """``parametrize`` over the full product, of which quick runs take a row for every pair; the rest is marked slow."""
    quick = [tuple(row.values()) for row in pairwise(factors, allowed)]
    rows = []
    for values in itertools.product(*factors.values()):
        if allowed(dict(zip(factors, values, strict=True))):
            rows.append(pytest.param(*values, marks=() if values in quick else pytest.mark.slow, id="-".join(map(str, values))))
    return pytest.mark.parametrize(tuple(factors), rows, **options)


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
FACTORS = {
    "act": [name for name in ACTIVATIONS if name not in ("prelu", "tlu")] + ["prelu", "tlu", "prelu shared", "tlu shared"],
    "dtype": DTYPES,
    "layout": ["nchw", "nhwc"],
    "route": ["single_pass", "two_pass"],
    "residual": [None, "pre_act", "post_act"],
    "parameters": ["both", "none", "bias", "half"],
}


def allowed(row: dict[str, Any]) -> bool:
    """Whether the values of ``FACTORS``, a kind and a shape can meet."""
    kind, shape = row["kind"], row["shape"]
    if "pre-norm" in kind and row["residual"] is not None:
        return False
    if row["layout"] == "nhwc" and len(shape) == 2:
        return False
    # statistics of single elements are refused by the norms
    return not (math.prod(shape[2:]) == 1 and kind.startswith(("instance", "batch instance")))


def options(row: dict[str, Any]) -> dict[str, Any]:
    """A row as arguments of `Case`."""
    kind, channels = dict(KINDS[row["kind"]]), row["shape"][1]
    if kind.get("groups") == 6:  # one per channel
        kind["groups"] = channels
    if kind.get("rule_weights") == 6:
        kind["rule_weights"] = channels
    return {
        "shape": row["shape"], "layout": row["layout"], "dtype": row["dtype"], "route": row["route"], "act": row["act"].split()[0],
        "shared_act_weight": "shared" in row["act"], "weight": row["parameters"] in ("both", "half"),
        "bias": row["parameters"] != "none", "half_parameters": row["parameters"] == "half", "residual": row["residual"],
        **kind,
    }  # fmt: skip


KINDS: dict[str, dict[str, Any]] = {
    "channel": {"scope": CHANNEL},
    "channel tracked": {"scope": CHANNEL, "tracked": True},
    "channel cumulative": {"scope": CHANNEL, "tracked": True, "momentum": None},
    "channel given": {"scope": CHANNEL, "tracked": True, "batch_statistics": False},
    "batch instance": {"scope": CHANNEL, "rule": BATCH_INSTANCE, "rule_weights": 6, "tracked": True},
    "batch instance cumulative": {"scope": CHANNEL, "rule": BATCH_INSTANCE, "rule_weights": 6, "tracked": True, "momentum": None},
    "batch instance given": {"scope": CHANNEL, "rule": BATCH_INSTANCE, "rule_weights": 6, "tracked": True, "batch_statistics": False},
    "group": {"scope": SAMPLE_GROUP, "groups": 2},
    "one group": {"scope": SAMPLE_GROUP, "groups": 1},
    "instance": {"scope": SAMPLE_GROUP, "groups": 6},
    "instance tracked": {"scope": SAMPLE_GROUP, "groups": 6, "tracked": True},
    "instance cumulative": {"scope": SAMPLE_GROUP, "groups": 6, "tracked": True, "momentum": None},
    "group rms": {"scope": SAMPLE_GROUP, "rule": RMS, "groups": 3},
    "filter response": {"scope": SAMPLE_GROUP, "rule": RMS, "groups": 6},
    "filter response, eps each": {"scope": SAMPLE_GROUP, "rule": RMS, "groups": 6, "rule_weights": 6},
    "filter response, one eps": {"scope": SAMPLE_GROUP, "rule": RMS, "groups": 6, "rule_weights": 1},
    "position": {"scope": POSITION},
    "position rms": {"scope": POSITION, "rule": RMS},
    "position pre-norm": {"scope": POSITION, "residual": PRE_NORM},
    "position rms pre-norm": {"scope": POSITION, "rule": RMS, "residual": PRE_NORM},
}
__all__ = [
    "DTYPES",
    "FACTORS",
    "KINDS",
    "PARAMETER_TOLERANCE",
    "TOLERANCE",
    "Case",
    "activate",
    "allowed",
    "covering",
    "ncs",
    "options",
    "pairwise",
]
