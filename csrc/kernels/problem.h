// What a call is, in plain numbers; the C++ twin of normfused/problem.py. No torch, no CUDA.
//
// Every norm is seen as (N, C, S): samples, channels, positions. A set is the group of elements that share one mean and variance.
#pragma once

#include <cstdint>

namespace normfused {

enum class Type : int { float32, float16, bfloat16, float64 };
enum class Scope : int { channel, sample_group, position };  // one set per c | per (n, g) | per (n, s)
enum class Rule : int { standard, rms, mean_only, renorm, batch_instance };  // rules/; the last three of scope channel
enum class Layout : int { nchw, nhwc };                      // (n*C + c)*S + s | (n*S + s)*C + c
enum class ResidualMode : int { none, pre_act, post_act, pre_norm };
enum class Step : int { norm_act, norm_act_backward, moments, apply, grad_moments, grad_apply };

// In the order of ACTIVATIONS in normfused/activations.py (a test compares them)
enum class Act : int {
    identity,
    relu,
    relu6,
    leaky_relu,
    prelu,
    elu,
    silu,
    gelu,
    gelu_tanh,
    hardswish,
    hardsigmoid,
    sigmoid,
    tanh,
    mish,
    softplus,
    tlu
};

constexpr int size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }
constexpr int vector_of(Type type) { return 16 / size_of(type); }  // elements of a 16-byte access

// Activations whose derivative takes two values: one bit an element is all the backward needs to know of z.
constexpr bool has_two_slopes(Act act) {
    return act == Act::relu || act == Act::relu6 || act == Act::leaky_relu || act == Act::hardsigmoid || act == Act::tlu;
}

struct Problem {
    Scope scope = Scope::channel;
    Layout layout = Layout::nchw;
    Type type = Type::float32;
    Rule rule = Rule::standard;
    bool batch_statistics = true;  // false: the moments are given (running statistics)
    int64_t N = 1, C = 1, S = 1;
    int64_t groups = 1;  // of scope sample_group; the four steps for rules written in PyTorch have groups == C
    double eps = 1e-5;
    double momentum = 0.1;
    bool cumulative = false;  // momentum None: 1/counter instead of momentum
    Act act = Act::identity;
    double p0 = 0, p1 = 0;  // negative_slope | alpha | beta, threshold
    ResidualMode residual_mode = ResidualMode::none;

    constexpr bool centred() const { return rule != Rule::rms; }  // else mean := 0, var := mean square
    constexpr int64_t elements() const { return N * C * S; }
    constexpr int64_t sets() const { return scope == Scope::channel ? C : scope == Scope::sample_group ? N * groups : N * S; }
    constexpr int64_t count() const { return elements() / sets(); }
    // numbers in ``mean`` and in ``rstd``; of batch-instance norm the batch's come first, then those of every (n, c)
    constexpr int64_t means() const { return rule == Rule::batch_instance ? (1 + N) * C : sets(); }
    constexpr int64_t rstds() const { return rule == Rule::renorm ? 3 * C : means(); }
    // Whether the forward leaves a bit mask for the backward (else, with a residual before an activation, z is recomputed from it).
    // The steps that stand in for a single pass of batch-instance norm have none.
    constexpr bool masked() const { return residual_mode == ResidualMode::pre_act && has_two_slopes(act) && rule != Rule::batch_instance; }
};

// A parameter, buffer or parameter's gradient: C values of its own type, or one for all channels. data may be null.
struct Parameter {
    void* data = nullptr;
    Type type = Type::float32;
    bool per_channel = true;
};

}  // namespace normfused
