"""The norms on rules in PyTorch: how to call each, and what it is, as plain float64 operations on the whole tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import normfused.functional as NF

EPS = 1e-5
Tensors = dict[str, Tensor]


def channels(t: Tensor, x: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (x.dim() - 2))


def over(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over dims."""
    return x.mean(dims, keepdim=True), x.var(dims, correction=0, keepdim=True)


def batch_dims(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


def affine(x: Tensor, t: Tensors) -> Tensor:
    return x * channels(t["weight"], x) + channels(t["bias"], x)


@dataclass(frozen=True)
class Member:
    """``call(x, tensors, training, **options)`` is the public function; ``oracle(x, tensors, training)`` gives z before residual and act.

    ``learned`` and ``kept`` make the parameters and buffers of C channels; ``after(x, tensors)`` the buffers after a training step.
    """

    name: str
    learned: Callable[[int], Tensors]
    kept: Callable[[int], Tensors]
    call: Callable[..., Tensor]
    oracle: Callable[[Tensor, Tensors, bool], Tensor]
    after: Callable[[Tensor, Tensors], Tensors] = lambda x, t: {}
    loose: tuple[str, ...] = ()  # gradients that are differences of sums
    least_dim: int = 2
    training: bool = True

    @property
    def modes(self) -> tuple[bool, ...]:
        return (True, False) if self.training else (False,)


def _numbers(n: int, scale: float, offset: float, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + offset


def _affine(c: int) -> Tensors:
    return {"weight": _numbers(c, 0.3, 1.0, 1), "bias": _numbers(c, 0.5, 0.0, 2)}


def _running(c: int) -> Tensors:
    return {"running_mean": _numbers(c, 1.0, 0.5, 3), "running_var": _numbers(c, 0.3, 0.0, 4).abs() + 0.7}


# ------------------------------------------------------------------------------------------------------- batch renorm
def _renorm(x: Tensor, t: Tensors, training: bool) -> Tensor:
    mean, std = channels(t["running_mean"], x), channels(t["running_std"], x)
    if not training:
        return affine((x - mean) / std, t)
    batch_mean, var = over(x, batch_dims(x))
    batch_std = (var + EPS).sqrt()
    r = (batch_std / std).clamp(1 / 1.5, 1.5).detach()
    d = ((batch_mean - mean) / std).clamp(-0.7, 0.7).detach()
    return affine((x - batch_mean) / batch_std * r + d, t)


def _renorm_after(x: Tensor, t: Tensors) -> Tensors:
    mean, var = over(x, batch_dims(x))
    std = (var + EPS).sqrt().flatten()
    return {
        "running_mean": t["running_mean"] + 0.2 * (mean.flatten() - t["running_mean"]),
        "running_std": t["running_std"] + 0.2 * (std - t["running_std"]),
    }


# ------------------------------------------------------------------------------------------------------- batch-instance
def _batch_instance(x: Tensor, t: Tensors, training: bool) -> Tensor:
    mean, var = over(x, batch_dims(x)) if training else (channels(t["running_mean"], x), channels(t["running_var"], x))
    own, own_var = over(x, spatial(x))
    gate = channels(t["gate"], x)
    return affine(gate * (x - mean) / (var + EPS).sqrt() + (1 - gate) * (x - own) / (own_var + EPS).sqrt(), t)


def _batch_after(x: Tensor, t: Tensors) -> Tensors:
    """Unbiased variance, momentum 0.1."""
    mean, var = x.mean(batch_dims(x)), x.var(batch_dims(x), correction=1)
    return {"running_mean": 0.9 * t["running_mean"] + 0.1 * mean, "running_var": 0.9 * t["running_var"] + 0.1 * var}


# ------------------------------------------------------------------------------------------------------- switchable
def _switch(using: tuple[str, ...], unbiased: bool) -> Callable[[Tensor, Tensors, bool], Tensor]:
    def oracle(x: Tensor, t: Tensors, training: bool) -> Tensor:
        flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        if unbiased and x.dim() > 2:  # as the reference implementation writes it
            own, own_var = flat.mean(2, keepdim=True), flat.var(2, keepdim=True)
            second = own_var + own**2
            ln = own.mean(1, keepdim=True)
            bn = own.mean(0, keepdim=True)
            found = {
                "in": (own, own_var),
                "ln": (ln, second.mean(1, keepdim=True) - ln**2),
                "bn": (bn, second.mean(0, keepdim=True) - bn**2),
            }
        else:
            correction = int(unbiased)
            found = {
                "in": (flat.mean(2, keepdim=True), flat.var(2, correction=0, keepdim=True)),
                "ln": (flat.mean((1, 2), keepdim=True), flat.var((1, 2), correction=correction, keepdim=True)),
                "bn": (flat.mean((0, 2), keepdim=True), flat.var((0, 2), correction=correction, keepdim=True)),
            }
        if not training and "bn" in using:
            found["bn"] = (t["running_mean"].view(1, -1, 1), t["running_var"].view(1, -1, 1))
        means, variances = torch.softmax(t["mean_weight"], 0), torch.softmax(t["var_weight"], 0)
        mean = sum(w * found[k][0] for w, k in zip(means, using, strict=True))
        var = sum(w * found[k][1] for w, k in zip(variances, using, strict=True))
        return affine(((flat - mean) / (var + EPS).sqrt()).view(x.shape), t)

    return oracle


def _switch_after(x: Tensor, t: Tensors) -> Tensors:
    mean, var = over(x, batch_dims(x))
    return {"running_mean": 0.9 * t["running_mean"] + 0.1 * mean.flatten(), "running_var": 0.9 * t["running_var"] + 0.1 * var.flatten()}


def switch_member(using: tuple[str, ...] = ("in", "ln", "bn"), unbiased: bool = False) -> Member:
    def learned(c: int) -> Tensors:
        k = len(using)
        return _affine(c) | {"mean_weight": _numbers(k, 0.7, 1.0, 5), "var_weight": _numbers(k, 0.7, 1.0, 6)}

    def call(x: Tensor, t: Tensors, training: bool, **options: Any) -> Tensor:
        given = {k: v for k, v in t.items() if "bn" in using or not k.startswith("running")}
        return NF.switch_norm_act(x, training=training, using=using, unbiased_instance_var=unbiased, **given, **options)

    return Member(
        f"switch {'+'.join(using)}{' unbiased' if unbiased else ''}", learned, _running, call, _switch(using, unbiased),
        _switch_after if "bn" in using and not unbiased else lambda x, t: {}, ("mean_weight", "var_weight"),
        3 if "in" in using else 2,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the others
def _mean_only(scaled: bool) -> Callable[[Tensor, Tensors, bool], Tensor]:
    def oracle(x: Tensor, t: Tensors, training: bool) -> Tensor:
        x = x * channels(t["scale"], x) if scaled else x
        mean = x.mean(batch_dims(x), keepdim=True) if training else channels(t["running_mean"], x)
        return x - mean + channels(t["bias"], x)

    return oracle


def _eval_norm(x: Tensor, t: Tensors, training: bool) -> Tensor:
    own, own_var = over(x, spatial(x)) if x.dim() > 2 else (x, torch.zeros_like(x))
    mean, var = channels(t["running_mean"], x), channels(t["running_var"], x)
    hat = mean + 0.3 * (own - mean)
    estimate = 0.2 * own_var + 0.8 * var + 0.2 * 0.8 * (own - mean) ** 2
    return affine((x - hat) / (estimate + EPS).sqrt(), t)


def whiten(x: Tensor, d: int, method: str, steps: int = 5, eps: float = EPS) -> tuple[Tensor, Tensor, Tensor]:
    """(z, mean, W): of every group by itself, over a matrix of channels and samples."""
    out, means, ws = [], [], []
    moved = x.movedim(1, 0).flatten(1)
    for rows in moved.split(d):
        mean = rows.mean(1, keepdim=True)
        xc = rows - mean
        cov = xc @ xc.T / xc.shape[1] + eps * torch.eye(d, dtype=x.dtype)
        if method == "zca":
            u, s, _ = torch.linalg.svd(cov)
            w = u @ torch.diag(s**-0.5) @ u.T
        else:
            trace = torch.trace(cov)
            w = torch.eye(d, dtype=x.dtype)
            for _ in range(steps):
                w = (3 * w - torch.linalg.matrix_power(w, 3) @ (cov / trace)) / 2
            w = w / trace.sqrt()
        out.append(w @ xc)
        means.append(mean)
        ws.append(w)
    return torch.cat(out).view(x.movedim(1, 0).shape).movedim(0, 1), torch.stack(means), torch.stack(ws)


def whiten_member(method: str, d: int) -> Member:
    def kept(c: int) -> Tensors:
        wm = _numbers(c * d, 0.3, 0.0, 8).view(c // d, d, d) + torch.eye(d, dtype=torch.float64)
        return {"running_mean": _numbers(c, 1.0, 0.0, 7).view(c // d, d, 1), "running_wm": wm}

    def call(x: Tensor, t: Tensors, training: bool, **options: Any) -> Tensor:
        return NF.iter_norm_act(x, training=training, method=method, **t, **options)

    def oracle(x: Tensor, t: Tensors, training: bool) -> Tensor:
        if training:
            return affine(whiten(x, d, method)[0], t)
        moved = x.movedim(1, 0).flatten(1).view(-1, d, x.numel() // x.shape[1])
        z = t["running_wm"] @ (moved - t["running_mean"])
        return affine(z.reshape(x.movedim(1, 0).shape).movedim(0, 1), t)

    def after(x: Tensor, t: Tensors) -> Tensors:
        _, mean, w = whiten(x, d, method)
        return {"running_mean": 0.9 * t["running_mean"] + 0.1 * mean, "running_wm": 0.9 * t["running_wm"] + 0.1 * w}

    return Member(f"whiten {method} {d}", _affine, kept, call, oracle, after)


MEMBERS = (
    Member(
        "batch renorm", _affine, lambda c: {"running_mean": _running(c)["running_mean"], "running_std": _running(c)["running_var"]},
        lambda x, t, training, **o: NF.batch_renorm_act(x, training=training, momentum=0.2, r_max=1.5, d_max=0.7, **t, **o),
        _renorm, _renorm_after,
    ),
    Member(
        "batch instance", lambda c: _affine(c) | {"gate": _numbers(c, 0.2, 0.5, 9).clamp(0, 1)}, _running,
        lambda x, t, training, **o: NF.batch_instance_norm_act(x, training=training, **t, **o),
        _batch_instance, _batch_after, ("gate",), 3,
    ),
    switch_member(),
    switch_member(unbiased=True),
    switch_member(("in", "ln")),
    switch_member(("ln", "bn")),
    Member(
        "mean only", lambda c: {"bias": _numbers(c, 0.5, 0.0, 2)}, lambda c: {"running_mean": _running(c)["running_mean"]},
        lambda x, t, training, **o: NF.mean_only_batch_norm_act(x, training=training, **t, **o),
        _mean_only(False), lambda x, t: {"running_mean": 0.9 * t["running_mean"] + 0.1 * x.mean(batch_dims(x))},
    ),
    Member(
        "mean only scaled", lambda c: {"bias": _numbers(c, 0.5, 0.0, 2), "scale": _numbers(c, 0.3, 1.0, 1)},
        lambda c: {"running_mean": _running(c)["running_mean"]},
        lambda x, t, training, **o: NF.mean_only_batch_norm_act(x, training=training, **t, **o),
        _mean_only(True), lambda x, t: {"running_mean": 0.9 * t["running_mean"] + 0.1 * t["scale"] * x.mean(batch_dims(x))},
    ),
    Member(
        "eval norm", _affine, _running, lambda x, t, training, **o: NF.eval_norm_act(x, alpha=0.3, beta=0.2, **t, **o),
        _eval_norm, training=False,
    ),
    whiten_member("newton", 3),
    whiten_member("zca", 2),
)  # fmt: skip
BY_NAME = {m.name: m for m in MEMBERS}
