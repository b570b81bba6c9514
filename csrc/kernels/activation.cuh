// act(z), its derivative, and the gradient of its own parameter, for a few lanes of a vector at a time.
//
// identity, relu (with leaky_relu) and silu are compiled into the kernels; every other activation shares one instantiation, which
// switches on a number that is the same for the whole launch: some 8 instructions each time.
// Comparisons are written so that NaN passes through; relu'(0) = 0; a tie z = tau of tlu counts as z.
// Two-slope activations (problem.h) have the derivative ``high`` where bit(z), else ``low``; the bit is what a mask keeps.
#pragma once

#include "call.h"
#include "pack.cuh"

namespace normfused {

constexpr int any_act = -1;  // else the number of an Act

// Lanes that are worked on together: all of a vector where there are registers for it. Of halves the compiler would widen all at once;
// where activations share an instantiation, the largest of them decides.
template <class T, int kAct> constexpr int part_size = sizeof(T) > 2                    ? vector_size<T>
                                                       : kAct == any_act                ? 2
                                                       : std::is_same<T, __half>::value ? 4
                                                                                        : 8;

// Neither tail cancels; where exp(-z) overflows, 1/inf is right
template <class A> NF_DEVICE A sigmoid(A z) { return reciprocal_fast_(A(1) + exp_of_minus_(z)); }

// and rest = sigmoid(-z), from the same exponential, which must not overflow for it: z from -80 (-700) on
template <class A> NF_DEVICE A sigmoid(A z, A& rest) {
    const A e = exp_of_minus_(max_nan_(z, sizeof(A) == 4 ? A(-80) : A(-700)));
    const A s = reciprocal_fast_(A(1) + e);
    rest = e * s;
    return s;
}

// z = 20 and more: tanh(softplus(z)) rounds to 1. n = e^z (e^z + 2);  tanh = n/(n+2);  1 - tanh^2 = 4 (n+1)/(n+2)^2
template <class A> NF_DEVICE A tanh_softplus(A z, A& rest) {
    const A e = exp_(z > A(20) ? A(20) : z);
    const A n = e * (e + A(2));
    const A inverse = reciprocal_(n + A(2));
    rest = A(4) * (n + A(1)) * inverse * inverse;
    return n * inverse;
}

template <int kAct, class A, int V> struct Activation {  // V lanes
    Act act;
    A p0, p1;

    NF_DEVICE Activation(const Call& call)
        : act(kAct == any_act ? Act(opaque(int(call.problem.act))) : Act(kAct)),
          p0(sizeof(A) == 4 ? A(call.p0) : A(call.problem.p0)),
          p1(sizeof(A) == 4 ? A(call.p1) : A(call.problem.p1)) {}

    NF_DEVICE Act which() const { return kAct == any_act ? act : Act(kAct); }
    // Whether relu or leaky_relu is zero below zero, where an infinite v times a slope of 0 would be NaN
    NF_DEVICE bool flat() const { return p0 == A(0); }
    NF_DEVICE A high() const { return which() == Act::hardsigmoid ? A(1) / A(6) : A(1); }
    NF_DEVICE A low() const { return which() == Act::relu || which() == Act::leaky_relu ? p0 : A(0); }

    NF_DEVICE bool bit(A z, A weight) const {
        switch (which()) {
            case Act::relu:
            case Act::leaky_relu: return !(z <= A(0));
            case Act::relu6: return !(z <= A(0) || z >= A(6));
            case Act::hardsigmoid: return !(z <= A(-3) || z >= A(3));
            default: return !(z < weight);  // tlu
        }
    }
    template <int W> NF_DEVICE unsigned bits(const A (&z)[V], const A (&weight)[W]) const {
        unsigned found = 0;
        NF_UNROLL
        for (int j = 0; j < V; ++j) found |= unsigned(bit(z[j], weight[W == 1 ? 0 : j])) << j;
        return found;
    }

    template <int W, class F> static NF_DEVICE void each(A (&z)[V], const A (&weight)[W], F f) {
        NF_UNROLL
        for (int j = 0; j < V; ++j) z[j] = f(z[j], weight[W == 1 ? 0 : j]);
    }

    // z becomes y
    template <int W> NF_DEVICE void forward(A (&z)[V], const A (&weight)[W]) const {
        const A a = p0, b = p1;
        switch (which()) {
            case Act::identity: return;
            case Act::relu:
            case Act::leaky_relu:
                if (flat()) return each(z, weight, [](A v, A) { return max_nan_(v, A(0)); });
                return each(z, weight, [=](A v, A) { return v < A(0) ? v * a : v; });
            case Act::relu6: return each(z, weight, [](A v, A) { return v < A(0) ? A(0) : v > A(6) ? A(6) : v; });
            case Act::prelu: return each(z, weight, [](A v, A w) { return v > A(0) ? v : v * w; });
            case Act::elu: return each(z, weight, [=](A v, A) { return v > A(0) ? v : a * expm1_(v); });
            case Act::silu: return each(z, weight, [](A v, A) { return v * sigmoid(v); });
            case Act::gelu: return each(z, weight, [](A v, A) { return v * (A(0.5) + A(0.5) * erf_(v * A(0.7071067811865476))); });
            case Act::gelu_tanh:  // 1/2 (1 + tanh u) = sigmoid(2u)
                return each(z, weight, [](A v, A) { return v * sigmoid(A(1.5957691216057308) * v * (A(1) + A(0.044715) * v * v)); });
            case Act::hardswish:
                return each(z, weight, [](A v, A) { return v * (v < A(-3) ? A(0) : v > A(3) ? A(6) : v + A(3)) * A(1.0 / 6); });
            case Act::hardsigmoid:
                return each(z, weight, [](A v, A) { return (v < A(-3) ? A(0) : v > A(3) ? A(6) : v + A(3)) * A(1.0 / 6); });
            case Act::sigmoid: return each(z, weight, [](A v, A) { return sigmoid(v); });
            case Act::tanh: return each(z, weight, [](A v, A) { return tanh_(v); });
            case Act::mish:
                return each(z, weight, [](A v, A) {
                    A rest;
                    return v * tanh_softplus(v, rest);
                });
            case Act::softplus:
                return each(z, weight, [=](A v, A) {
                    const A u = v * a;
                    return u > b ? v : ((u < A(0) ? A(0) : u) + log1p_(exp_(-abs_(u)))) / a;
                });
            default: return each(z, weight, [](A v, A w) { return v < w ? w : v; });  // tlu
        }
    }

    template <int W, class F> static NF_DEVICE void each(A (&dz)[V], const A (&z)[V], const A (&weight)[W], F f) {
        NF_UNROLL
        for (int j = 0; j < V; ++j) dz[j] *= f(z[j], weight[W == 1 ? 0 : j]);
    }

    // dz arrives as dy and becomes dy*act'(z); dweight is what every lane adds to the gradient of act's own parameter
    template <int W> NF_DEVICE void backward(A (&dz)[V], const A (&z)[V], const A (&weight)[W], A (&dweight)[V]) const {
        const A a = p0, b = p1;
        switch (which()) {
            case Act::identity: return;
            case Act::prelu:
                NF_UNROLL
                for (int j = 0; j < V; ++j) dweight[j] = z[j] <= A(0) ? z[j] * dz[j] : A(0);
                return each(dz, z, weight, [](A v, A w) { return v <= A(0) ? w : A(1); });
            case Act::elu: return each(dz, z, weight, [=](A v, A) { return v > A(0) ? A(1) : a * exp_(v); });
            case Act::silu:
                return each(dz, z, weight, [](A v, A) {
                    A rest;
                    const A s = sigmoid(v, rest);
                    return s * fma_(v, rest, A(1));
                });
            case Act::gelu:
                return each(dz, z, weight, [](A v, A) {
                    return A(0.5) + A(0.5) * erf_(v * A(0.7071067811865476)) + v * A(0.3989422804014327) * exp_(A(-0.5) * v * v);
                });
            case Act::gelu_tanh:
                return each(dz, z, weight, [](A v, A) {
                    const A u = A(1.5957691216057308) * v * (A(1) + A(0.044715) * v * v);
                    const A slope = A(1.5957691216057308) * (A(1) + A(0.134145) * v * v);
                    A rest;
                    const A s = sigmoid(u, rest);
                    return s * fma_(v * slope, rest, A(1));
                });
            case Act::hardswish:
                return each(dz, z, weight, [](A v, A) { return v <= A(-3) ? A(0) : v >= A(3) ? A(1) : v * A(1.0 / 3) + A(0.5); });
            case Act::sigmoid:
                return each(dz, z, weight, [](A v, A) {
                    A rest;
                    return sigmoid(v, rest) * rest;
                });
            case Act::tanh:
                return each(dz, z, weight, [](A v, A) {
                    A rest;
                    return A(4) * sigmoid(A(2) * v, rest) * rest;
                });
            case Act::mish:
                return each(dz, z, weight, [](A v, A) {
                    A rest;
                    const A t = tanh_softplus(v, rest);
                    return t + v * rest * sigmoid(v);
                });
            case Act::softplus: return each(dz, z, weight, [=](A v, A) { return v * a > b ? A(1) : sigmoid(v * a); });
            default: return two_slopes(dz, dweight, [&](int j) { return bit(z[j], weight[W == 1 ? 0 : j]); });
        }
    }

    // The same from the bits of a two-slope activation
    NF_DEVICE void from_bits(A (&dz)[V], unsigned bits, A (&dweight)[V]) const {
        two_slopes(dz, dweight, [=](int j) { return bool(bits >> j & 1); });
    }
    template <class Bit> NF_DEVICE void two_slopes(A (&dz)[V], A (&dweight)[V], const Bit& bit_of) const {
        const A up = high(), down = low();
        if (kAct == any_act) {
            NF_UNROLL
            for (int j = 0; j < V; ++j) dweight[j] = bit_of(j) ? A(0) : dz[j];  // tlu's; nobody else asks
        }
        if (opaque(int(down == A(0)))) {  // an infinite dy stays out of a flat branch
            NF_UNROLL
            for (int j = 0; j < V; ++j) dz[j] = bit_of(j) ? dz[j] * up : A(0);
        } else {
            NF_UNROLL
            for (int j = 0; j < V; ++j) dz[j] *= bit_of(j) ? up : down;
        }
    }
};

}  // namespace normfused
