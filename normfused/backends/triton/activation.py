"""act(z), act'(z) and the derivative from y, for the tile of any step; ACT, P0, P1 are compile-time numbers of an `Activation`.

No libdevice (the interpreter cannot run it), and nothing that loses digits near 0: expm1 and log1p are series where the direct
form cancels. Comparisons are written so that NaN passes through, relu'(0) = 0, and a tie z = tau of tlu counts as z.
Costs no memory traffic; per element at most two exponentials and one division.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """exp(x) - 1; a Taylor polynomial where the difference would cancel (x must not need more than exp's range)."""
    TERMS: tl.constexpr = 15 if x.dtype == tl.float64 else 9
    small = tl.where(tl.abs(x) < 0.5, x, 0.0)
    series = small * (1.0 / TERMS) + 1.0
    for k in tl.static_range(TERMS - 2):
        series = small * series * (1.0 / (TERMS - 1 - k)) + 1.0
    return tl.where(tl.abs(x) < 0.5, small * series, tl.exp(x) - 1.0)


@triton.jit
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1, as 2 atanh(x / (2 + x))."""
    TERMS: tl.constexpr = 18 if x.dtype == tl.float64 else 9
    s = x / (2.0 + x)
    square = s * s
    series = square * 0.0 + 1.0 / (2 * TERMS - 1)
    for k in tl.static_range(TERMS - 1):
        series = series * square + 1.0 / (2 * (TERMS - 2 - k) + 1)
    return 2.0 * s * series


@triton.jit
def sigmoid(x):
    # of -|x|, so that exp cannot overflow and neither tail cancels
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    u = expm1(-2.0 * tl.abs(x))
    t = -u / (2.0 + u)
    return tl.where(x < 0, -t, t)


@triton.jit
def tanh_softplus(z):
    """(tanh(softplus(z)), 1 - its square), with n = e^z (e^z + 2): n / (n + 2) and 4 (n + 1) / (n + 2)^2."""
    e = tl.exp(tl.where(z > 20.0, 20.0, z))  # from there on tanh(softplus) rounds to 1
    n = e * (e + 2.0)
    return n / (n + 2.0), 4.0 * (n + 1.0) / ((n + 2.0) * (n + 2.0))


@triton.jit
def activate(z, weight, ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """act(z); ``weight`` broadcasts against z (prelu's slope, tlu's threshold)."""
    if ACT == "relu":
        return tl.where(z < 0, 0.0, z)
    elif ACT == "relu6":
        return tl.where(z < 0, 0.0, tl.where(z > 6.0, 6.0, z))
    elif ACT == "leaky_relu":
        return tl.where(z > 0, z, z * P0)
    elif ACT == "prelu":
        return tl.where(z > 0, z, z * weight)
    elif ACT == "elu":
        return tl.where(z > 0, z, P0 * expm1(z))
    elif ACT == "silu":
        return z * sigmoid(z)
    elif ACT == "gelu":
        return z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 1/2 (1 + tanh u) = sigmoid(2u), u = sqrt(2/pi) (z + 0.044715 z^3)
        return z * sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
    elif ACT == "hardswish":
        return z * tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 6.0, z + 3.0)) * (1.0 / 6)
    elif ACT == "hardsigmoid":
        return tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 6.0, z + 3.0)) * (1.0 / 6)
    elif ACT == "sigmoid":
        return sigmoid(z)
    elif ACT == "tanh":
        return tanh(z)
    elif ACT == "mish":
        t, _ = tanh_softplus(z)
        return z * t
    elif ACT == "softplus":
        u = z * P0
        return tl.where(u > P1, z, (tl.where(u < 0, 0.0, u) + log1p_unit(tl.exp(-tl.abs(u)))) / P0)
    elif ACT == "tlu":
        return tl.where(z < weight, weight, z)
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
        return z


@triton.jit
def grad_activate(dy, z, weight, ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """dz = dy*act'(z)."""
    if ACT == "relu":
        return tl.where(z <= 0, 0.0, dy)
    elif ACT == "relu6":
        return tl.where((z <= 0) | (z >= 6.0), 0.0, dy)
    elif ACT == "leaky_relu":
        return tl.where(z > 0, dy, dy * P0)
    elif ACT == "prelu":
        return tl.where(z <= 0, dy * weight, dy)
    elif ACT == "elu":
        return tl.where(z > 0, dy, dy * (P0 * tl.exp(tl.where(z > 0, 0.0, z))))
    elif ACT == "silu":
        s = sigmoid(z)
        return dy * (s * (1.0 + z * sigmoid(-z)))
    elif ACT == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return dy * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476) + z * density)
    elif ACT == "gelu_tanh":
        u = 1.5957691216057308 * z * (1.0 + 0.044715 * z * z)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
        s = sigmoid(u)
        return dy * (s * (1.0 + z * slope * sigmoid(-u)))
    elif ACT == "hardswish":
        return dy * tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, 1.0, z * (1.0 / 3) + 0.5))
    elif ACT == "hardsigmoid":
        return tl.where((z <= -3.0) | (z >= 3.0), 0.0, dy * (1.0 / 6))
    elif ACT == "sigmoid":
        return dy * (sigmoid(z) * sigmoid(-z))
    elif ACT == "tanh":
        return dy * (4.0 * sigmoid(2.0 * z) * sigmoid(-2.0 * z))
    elif ACT == "mish":
        t, rest = tanh_softplus(z)
        return dy * (t + z * rest * sigmoid(z))
    elif ACT == "softplus":
        return tl.where(z * P0 > P1, dy, dy * sigmoid(z * P0))
    elif ACT == "tlu":
        return tl.where(z < weight, 0.0, dy)
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
        return dy


@triton.jit
def grad_activate_from_y(dy, y, ACT: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr):
    """dz from the stored y, where y determines the derivative."""
    if ACT == "relu":
        return tl.where(y <= 0, 0.0, dy)
    elif ACT == "relu6":
        return tl.where((y <= 0) | (y >= 6.0), 0.0, dy)
    elif ACT == "leaky_relu":
        return tl.where(y > 0, dy, dy * P0)
    elif ACT == "elu":
        return tl.where(y > 0, dy, dy * (y + P0))
    elif ACT == "hardsigmoid":
        return tl.where((y <= 0) | (y >= 1.0), 0.0, dy * (1.0 / 6))
    else:
        tl.static_assert(ACT == "softplus", "y does not determine the derivative")
        return tl.where(y * P0 > P1, dy, -dy * expm1(-P0 * y))


@triton.jit
def on_first_slope(z, weight, ACT: tl.constexpr):
    """The bit that tells act'(z) of an activation with two slopes (NaN has that of `grad_activate`)."""
    if ACT == "relu":
        return (z <= 0) == 0
    elif ACT == "relu6":
        return ((z <= 0) | (z >= 6.0)) == 0
    elif ACT == "leaky_relu":
        return z > 0
    elif ACT == "hardsigmoid":
        return ((z <= -3.0) | (z >= 3.0)) == 0
    else:
        tl.static_assert(ACT == "tlu", "an activation of two slopes")
        return (z < weight) == 0


@triton.jit
def grad_activate_from_bit(dy, bit, ACT: tl.constexpr, P0: tl.constexpr):
    """dz from the bit of `on_first_slope`."""
    if ACT == "leaky_relu":
        return tl.where(bit, dy, dy * P0)
    elif ACT == "hardsigmoid":
        return tl.where(bit, dy * (1.0 / 6), 0.0)
    else:
        return tl.where(bit, dy, 0.0)


@triton.jit
def grad_weight(dy, z, weight, ACT: tl.constexpr, SOURCE: tl.constexpr):
    """dL/dweight of every element: prelu [z <= 0] z*dy, tlu [z < tau] dy; ``z`` as `activation_gradient` gives it."""
    if ACT == "prelu":
        return tl.where(z <= 0, z * dy, 0.0)
    elif SOURCE == "mask":
        return tl.where(z, 0.0, dy)
    else:
        return tl.where(z < weight, dy, 0.0)
