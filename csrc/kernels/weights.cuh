// Weight norm and spectral norm of many weights in one launch: a table of tensors comes by value with the launch, and a block finds its
// weight by the number of the first block of each. A graph that captured a launch has the table in its node; nothing is copied.
//
//   weight norm      weight_norm            w = g*v/|v| per row                                          read v, write w
//                    weight_norm_backward   dg = <dw, v>/|v|, dv = g/|v|*dw - g*dg/|v|^2*v per row       read dw, v, write dv
//   spectral norm    matvec                 t = W v, sums of t^2 (or, without an iteration, of u*t)      read W
//                    transposed_matvec      u = t/max(|t|, eps), s = W' u, sums of s^2                   read W
//                    scale                  v = s/max(|s|, eps), sigma = |s|^2/max(|s|, eps), w = W/sigma    read W, write w
//                    inner_product          sums of dw*W                                                 read dw, W
//                    spectral_gradient      dW = (dw - <dw, W>/sigma*u v')/sigma                         read dw, write dW
//
// That is 2W for weight norm and 4W for spectral norm forward, 3W and 4W backward (W: bytes of the weights). A row of weight norm stays in
// registers if it has at most ``held_vectors`` a thread, of all tensors together; what follows is asked for once more. So are rows that
// are not contiguous (A > 1: transposed convolutions). After an iteration sigma is known from s, so that no third product is needed.
//
// Per 16 bytes of an aligned row: one load, and one store where something is written; per element a fma to sum it and a multiplication
// or fma to write it, beside the conversions of 2-byte types. spectral_gradient also divides indices, once a vector (twice for A > 1), and
// loads v element by element, from L1.
//
// Sums: a thread over its elements in order, threads by over_set or halves of a table, blocks by index. Numbers per row and column, and
// sums of blocks, are of the accumulator's type.
#pragma once

#include "pack.cuh"
#include "reduce.cuh"
#include "weights.h"

namespace normfused {

constexpr int weight_threads = 256, weight_warps = weight_threads / 32;
constexpr int held_vectors = 8;           // of a thread, over all tensors of a row (unmeasured)
constexpr uint32_t warp_row_vectors = 128;  // a row of at most so many belongs to a warp, a longer one to a block (unmeasured)
constexpr uint32_t column_vectors = 8;      // that a block of transposed_matvec has side by side: 128 bytes
constexpr uint32_t chunk_vectors = 8;       // of a thread in passes that know no rows
constexpr uint32_t most_chunks = 1024;      // of a weight: who reads their sums reads them all

// ------------------------------------------------------------------------------------------------------------ what a block works on
struct WeightEntry {
    void* tensors[5];
    WeightView view;
    uint32_t first;          // block of this launch
    uint32_t sums;           // where the previous launch left its sums
    uint32_t rows, columns;  // of the weights before it
};
// Vectors may be taken from all of its tensors: their rows start on 16-byte boundaries. In the highest bit of the period.
constexpr uint32_t aligned_bit = 0x80000000u;

constexpr int weights_of_launch = 54;  // a launch's arguments are at most 4 KB
struct WeightCall {
    WeightEntry entries[weights_of_launch];
    int count;
    uint32_t first_weight;  // of the call, in sigma
    int given;              // u and v are those of the parametrization: no iteration came before
    int iterates;           // the sums are of squares
    double eps;
    void *norms, *u, *v, *sigma, *t, *s;
    void *read_sums, *write_sums;  // one per block
};
static_assert(sizeof(WeightCall) <= 4096, "arguments of a launch");

template <class T> NF_HOST_DEVICE constexpr uint32_t lanes_of(const WeightEntry& e) {
    return e.view.period & aligned_bit ? uint32_t(vector_size<T>) : 1u;
}
NF_HOST_DEVICE constexpr uint32_t cut(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// Rows of a block of weight norm and matvec
NF_HOST_DEVICE constexpr uint32_t team_of_row(const WeightView& v, uint32_t lanes) {
    return v.B <= warp_row_vectors * lanes ? 32u : uint32_t(weight_threads);
}
NF_HOST_DEVICE constexpr uint32_t rows_of_block(const WeightView& v, uint32_t lanes) {
    return v.A == 1 ? weight_threads / team_of_row(v, lanes) : v.B >= 32 ? 1u : 32u / v.B;
}
NF_HOST_DEVICE constexpr uint32_t row_blocks(const WeightView& v, uint32_t lanes) { return cut(v.R, rows_of_block(v, lanes)); }

// Columns of a block of transposed_matvec, in vectors
NF_HOST_DEVICE constexpr uint32_t columns_of_block(const WeightView& v, uint32_t lanes) {
    const uint32_t most = lanes == 1 ? 32u : column_vectors, all = v.B / lanes;
    return all < most ? all : most;
}
NF_HOST_DEVICE constexpr uint32_t column_blocks(const WeightView& v, uint32_t lanes) {
    return v.A * cut(v.B / lanes, columns_of_block(v, lanes));
}

// Elements of a block of the other passes
NF_HOST_DEVICE constexpr uint32_t chunk_of(const WeightView& v, uint32_t vector) {
    const uint32_t least = weight_threads * chunk_vectors * vector;
    return least * cut(cut(v.numel(), least), most_chunks);
}
NF_HOST_DEVICE constexpr uint32_t chunks_of(const WeightView& v, uint32_t vector) { return cut(v.numel(), chunk_of(v, vector)); }

// The weight of this block
NF_DEVICE const WeightEntry& entry_of_block(const WeightCall& call) {
    int low = 0, high = call.count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (call.entries[middle].first <= block_index()) low = middle;
        else high = middle - 1;
    }
    return call.entries[low];
}
NF_DEVICE WeightView view_of(const WeightEntry& e) {
    WeightView v = e.view;
    v.period &= ~aligned_bit;
    return v;
}

// Shared memory: over_set's scratch, then a table
template <class A> constexpr int table_offset = 32 * int(sizeof(A));
template <class T> constexpr uint32_t weight_shared_bytes = (32 + weight_threads * vector_size<T>)*sizeof(AccumulatorOf<T>);

template <class A> NF_DEVICE A over_block(A value) {
    Sums<A, 1> sum;
    sum.of[0] = value;
    return over_set<A>(sum, weight_threads, 0).of[0];
}

// The sums that ``count`` blocks of the previous launch left
template <class A> NF_DEVICE A sum_of_blocks(const WeightCall& call, uint32_t first, uint32_t count) {
    const Global<A> sums(call.read_sums);
    A sum = 0;
    for (uint32_t i = thread_index(); i < count; i += weight_threads) sum += sums.load_coherent(first + i);
    return over_block(sum);
}
template <class A> NF_DEVICE void leave_sum(const WeightCall& call, A value) {
    const A sum = over_block(value);
    if (thread_index() == 0) Global<A>(call.write_sums).store(block_index(), sum);
}

// As torch's clamp_min: NaN stays
template <class A> NF_DEVICE A at_least(A length, A eps) { return length < eps ? eps : length; }

// ------------------------------------------------------------------------------------------------------------------- contiguous rows
// A row of ``vectors`` vectors, kTensors of them side by side: product() of every vector is summed over the team, and each() then meets
// every vector again, with the sum. The vectors that fit stay in registers.
template <class T, int kLanes, int kTensors, class Product, class Each>
NF_DEVICE void over_row(const Global<const T> (&from)[kTensors], int64_t start, uint32_t vectors, uint32_t team, const Product& product,
                        const Each& each) {
    using A = AccumulatorOf<T>;
    constexpr int kHeld = held_vectors / kTensors;
    const uint32_t lane = thread_index() % team;
    Pack<T, kLanes> held[kHeld][kTensors];
    Sums<A, 1> sum;
    NF_UNROLL
    for (int k = 0; k < kHeld; ++k) {
        const uint32_t i = lane + uint32_t(k) * team;
        if (i >= vectors) continue;
        NF_UNROLL
        for (int j = 0; j < kTensors; ++j) held[k][j] = from[j].template load<kLanes>(start + int64_t(i) * kLanes);
    }
    NF_UNROLL
    for (int k = 0; k < kHeld; ++k) {
        if (lane + uint32_t(k) * team < vectors) sum.of[0] = product(held[k], sum.of[0]);
    }
    const uint32_t first_passing = lane + uint32_t(kHeld) * team;
    for (uint32_t i = first_passing; i < vectors; i += team) {
        Pack<T, kLanes> values[kTensors];
        NF_UNROLL
        for (int j = 0; j < kTensors; ++j) values[j] = from[j].template load<kLanes>(start + int64_t(i) * kLanes);
        sum.of[0] = product(values, sum.of[0]);
    }
    const A total = over_set<A>(sum, int(team), 0).of[0];
    const auto finish = each(total);
    NF_UNROLL
    for (int k = 0; k < kHeld; ++k) {
        const uint32_t i = lane + uint32_t(k) * team;
        if (i < vectors) finish(start + int64_t(i) * kLanes, held[k]);
    }
    for (uint32_t i = first_passing; i < vectors; i += team) {
        Pack<T, kLanes> values[kTensors];
        NF_UNROLL
        for (int j = 0; j < kTensors; ++j) values[j] = from[j].template load<kLanes>(start + int64_t(i) * kLanes);
        finish(start + int64_t(i) * kLanes, values);
    }
}

// ---------------------------------------------------------------------------------------------------------------- rows in pieces
// Rows [first, first + count) of a weight with A > 1: for every a they are one run of count*B elements. Lanes go along it, warps share
// out a. Of several rows all fit into 32 lanes, so that a thread's elements belong to one row.
struct Pieces {
    WeightView view;
    uint32_t first, count, lane, warp;

    NF_DEVICE Pieces(const WeightView& v, uint32_t block) : view(v), lane(lane_index()), warp(warp_index()) {
        const uint32_t most = v.B >= 32 ? 1u : 32u / v.B;
        first = block * most;
        count = v.R - first < most ? v.R - first : most;
    }
    NF_DEVICE uint32_t row() const { return count == 1 ? 0 : lane / view.B; }
    NF_DEVICE bool has_row() const { return lane < count * view.B || count == 1; }

    // body(index of the element, column)
    template <class Body> NF_DEVICE void each(const Body& body) const {
        const uint32_t width = count * view.B, before = row() * view.B;
        for (uint32_t a = warp; a < view.A; a += weight_warps) {
            const int64_t start = (int64_t(a) * view.R + first) * view.B;
            for (uint32_t c = lane; c < width; c += 32) body(start + c, a * view.B + c - before);
        }
    }

    // Of the thread's row, from the sum of each thread
    template <class A> NF_DEVICE A sum(A value) const {
        if (count == 1) return over_block(value);
        const Shared<A> table = shared_at<A>(table_offset<A>, 32 * weight_warps), columns = shared_at<A>(0, 32);
        table.set(int(warp * 32 + lane), value);
        sync_block();
        if (warp == 0) {
            A column = 0;
            NF_UNROLL
            for (int k = 0; k < weight_warps; ++k) column += table.get(k * 32 + int(lane));
            columns.set(int(lane), column);
        }
        sync_block();
        A total = 0;
        if (has_row())
            for (uint32_t b = 0; b < view.B; ++b) total += columns.get(int(row() * view.B + b));
        sync_block();
        return total;
    }
};

// ------------------------------------------------------------------------------------------------------------------------ weight norm
template <class T, int kLanes> NF_DEVICE void weight_norm_rows(const WeightCall& call, const WeightEntry& e, uint32_t block) {
    using A = AccumulatorOf<T>;
    const WeightView view = view_of(e);
    const uint32_t team = team_of_row(view, kLanes), row = block * (weight_threads / team) + thread_index() / team;
    if (row >= view.R) return;  // a whole warp, and without barriers
    const Global<const T> v[1] = {Global<const T>(e.tensors[0])}, g(e.tensors[1]);
    const Global<T> w(e.tensors[2]);
    over_row<T, kLanes>(
        v, int64_t(row) * view.B, view.B / kLanes, team,
        [](const Pack<T, kLanes>(&values)[1], A sum) {
            NF_UNROLL
            for (int j = 0; j < kLanes; ++j) sum = fma_(A(widen(values[0].data[j])), A(widen(values[0].data[j])), sum);
            return sum;
        },
        [&](A sum) {
            const A norm = sqrt_(sum), scale = A(widen(g.load(row))) / norm;
            if (thread_index() % team == 0) Global<A>(call.norms).store(e.rows + row, norm);
            return [=](int64_t at, const Pack<T, kLanes>(&values)[1]) {
                Pack<T, kLanes> out;
                NF_UNROLL
                for (int j = 0; j < kLanes; ++j) out.data[j] = narrow<T>(scale * widen(values[0].data[j]));
                w.template store<kLanes>(at, out);
            };
        });
}

template <class T> NF_DEVICE void weight_norm_pieces(const WeightCall& call, const WeightEntry& e, uint32_t block) {
    using A = AccumulatorOf<T>;
    const Pieces pieces(view_of(e), block);
    const Global<const T> v(e.tensors[0]), g(e.tensors[1]);
    const Global<T> w(e.tensors[2]);
    A sum = 0;
    pieces.each([&](int64_t at, uint32_t) {
        const A value = widen(v.load(at));
        sum = fma_(value, value, sum);
    });
    const A norm = sqrt_(pieces.sum(sum));
    if (!pieces.has_row()) return;
    const uint32_t row = pieces.first + pieces.row();
    const A scale = A(widen(g.load(row))) / norm;
    pieces.each([&](int64_t at, uint32_t) { w.store(at, narrow<T>(scale * widen(v.load(at)))); });
    const bool first = pieces.count == 1 ? pieces.lane == 0 : pieces.lane % pieces.view.B == 0;
    if (pieces.warp == 0 && first) Global<A>(call.norms).store(e.rows + row, norm);
}

template <class T> NF_KERNEL(weight_threads) weight_norm_kernel(NF_GRID_CONSTANT WeightCall call) {
    const WeightEntry& e = entry_of_block(call);
    const uint32_t block = block_index() - e.first;
    if (e.view.A != 1) weight_norm_pieces<T>(call, e, block);
    else if (lanes_of<T>(e) == 1) weight_norm_rows<T, 1>(call, e, block);
    else weight_norm_rows<T, vector_size<T>>(call, e, block);
}

template <class T, int kLanes> NF_DEVICE void weight_gradient_rows(const WeightCall& call, const WeightEntry& e, uint32_t block) {
    using A = AccumulatorOf<T>;
    const WeightView view = view_of(e);
    const uint32_t team = team_of_row(view, kLanes), row = block * (weight_threads / team) + thread_index() / team;
    if (row >= view.R) return;  // a whole warp, and without barriers
    const Global<const T> both[2] = {Global<const T>(e.tensors[0]), Global<const T>(e.tensors[1])}, g(e.tensors[2]);
    const Global<T> dg(e.tensors[3]), dv(e.tensors[4]);
    over_row<T, kLanes>(
        both, int64_t(row) * view.B, view.B / kLanes, team,
        [](const Pack<T, kLanes>(&values)[2], A sum) {
            NF_UNROLL
            for (int j = 0; j < kLanes; ++j) sum = fma_(A(widen(values[0].data[j])), A(widen(values[1].data[j])), sum);
            return sum;
        },
        [&](A sum) {
            const A norm = Global<const A>(call.norms).load(e.rows + row), slope = sum / norm, p = A(widen(g.load(row))) / norm;
            const A q = -p * slope / norm;
            if (thread_index() % team == 0) dg.store(row, narrow<T>(slope));
            return [=](int64_t at, const Pack<T, kLanes>(&values)[2]) {
                Pack<T, kLanes> out;
                NF_UNROLL
                for (int j = 0; j < kLanes; ++j)
                    out.data[j] = narrow<T>(fma_(q, A(widen(values[1].data[j])), p * widen(values[0].data[j])));
                dv.template store<kLanes>(at, out);
            };
        });
}

template <class T> NF_DEVICE void weight_gradient_pieces(const WeightCall& call, const WeightEntry& e, uint32_t block) {
    using A = AccumulatorOf<T>;
    const Pieces pieces(view_of(e), block);
    const Global<const T> dw(e.tensors[0]), v(e.tensors[1]), g(e.tensors[2]);
    const Global<T> dg(e.tensors[3]), dv(e.tensors[4]);
    A sum = 0;
    pieces.each([&](int64_t at, uint32_t) { sum = fma_(A(widen(dw.load(at))), A(widen(v.load(at))), sum); });
    sum = pieces.sum(sum);
    if (!pieces.has_row()) return;
    const uint32_t row = pieces.first + pieces.row();
    const A norm = Global<const A>(call.norms).load(e.rows + row), slope = sum / norm, p = A(widen(g.load(row))) / norm;
    const A q = -p * slope / norm;
    pieces.each([&](int64_t at, uint32_t) { dv.store(at, narrow<T>(fma_(q, A(widen(v.load(at))), p * widen(dw.load(at))))); });
    const bool first = pieces.count == 1 ? pieces.lane == 0 : pieces.lane % pieces.view.B == 0;
    if (pieces.warp == 0 && first) dg.store(row, narrow<T>(slope));
}

template <class T> NF_KERNEL(weight_threads) weight_norm_backward_kernel(NF_GRID_CONSTANT WeightCall call) {
    const WeightEntry& e = entry_of_block(call);
    const uint32_t block = block_index() - e.first;
    if (e.view.A != 1) weight_gradient_pieces<T>(call, e, block);
    else if (lanes_of<T>(e) == 1) weight_gradient_rows<T, 1>(call, e, block);
    else weight_gradient_rows<T, vector_size<T>>(call, e, block);
}

// ---------------------------------------------------------------------------------------------------------------------- spectral norm
// v by the column in memory: that of the parametrization, or the previous iteration's
template <class T> struct Columns {
    using A = AccumulatorOf<T>;
    Global<T> given;
    Global<A> s;
    WeightView view;
    A scale;
    bool is_given;

    NF_DEVICE A at(uint32_t m) const { return is_given ? A(widen(given.load_coherent(view.column_of(m)))) : scale * s.load_coherent(m); }
    template <int kLanes> NF_DEVICE void lanes(uint32_t m, A (&to)[kLanes]) const {
        if (kLanes > 1 && is_given && view.period == 0) {
            const Pack<T, kLanes> values = given.template load_coherent<kLanes>(m);
            NF_UNROLL
            for (int j = 0; j < kLanes; ++j) to[j] = widen(values.data[j]);
        } else {
            NF_UNROLL
            for (int j = 0; j < kLanes; ++j) to[j] = at(m + j);
        }
    }
};

template <class T, int kLanes>
NF_DEVICE AccumulatorOf<T> row_product(const WeightEntry& e, const Columns<T>& v, uint32_t row, uint32_t team) {
    using A = AccumulatorOf<T>;
    const Global<const T> weight(e.tensors[0]);
    const int64_t start = int64_t(row) * v.view.B;
    Sums<A, 1> sum;
    constexpr int kBatch = 4;
    const uint32_t vectors = v.view.B / kLanes;
    for (uint32_t first = thread_index() % team; first < vectors; first += kBatch * team) {
        Pack<T, kLanes> values[kBatch];
        NF_UNROLL
        for (int k = 0; k < kBatch; ++k)
            if (first + k * team < vectors) values[k] = weight.template load<kLanes>(start + int64_t(first + k * team) * kLanes);
        NF_UNROLL
        for (int k = 0; k < kBatch; ++k) {
            if (first + k * team >= vectors) continue;
            A columns[kLanes];
            v.template lanes<kLanes>((first + k * team) * kLanes, columns);
            NF_UNROLL
            for (int j = 0; j < kLanes; ++j) sum.of[0] = fma_(A(widen(values[k].data[j])), columns[j], sum.of[0]);
        }
    }
    return over_set<A>(sum, int(team), 0).of[0];
}

// t = W v
template <class T> NF_KERNEL(weight_threads) matvec_kernel(NF_GRID_CONSTANT WeightCall call) {
    using A = AccumulatorOf<T>;
    const WeightEntry& e = entry_of_block(call);
    const uint32_t block = block_index() - e.first, lanes = lanes_of<T>(e);
    Columns<T> v{Global<T>(e.tensors[2]), Global<A>(call.s).advance(e.columns), view_of(e), A(1), call.given != 0};
    const WeightView& view = v.view;
    if (!v.is_given) v.scale = A(1) / at_least(sqrt_(sum_of_blocks<A>(call, e.sums, column_blocks(view, lanes))), A(call.eps));
    uint32_t row = view.R;
    A product = 0;
    bool writes;
    if (view.A == 1) {
        const uint32_t team = team_of_row(view, lanes);
        row = block * (weight_threads / team) + thread_index() / team;
        if (row < view.R) product = lanes == 1 ? row_product<T, 1>(e, v, row, team) : row_product<T, vector_size<T>>(e, v, row, team);
        writes = row < view.R && thread_index() % team == 0;
    } else {
        const Pieces pieces(view, block);
        const Global<const T> weight(e.tensors[0]);
        A sum = 0;
        pieces.each([&](int64_t at, uint32_t m) { sum = fma_(A(widen(weight.load(at))), v.at(m), sum); });
        product = pieces.sum(sum);
        row = pieces.first + pieces.row();
        writes = pieces.warp == 0 && pieces.has_row() && (pieces.count == 1 ? pieces.lane == 0 : pieces.lane % view.B == 0);
    }
    A term = 0;
    if (writes) {
        Global<A>(call.t).store(e.rows + row, product);
        term = product * (call.iterates ? product : A(widen(Global<const T>(e.tensors[1]).load(row))));
    }
    leave_sum(call, term);
}

// s = W' u, of ``columns_of_block`` vectors of columns of one matrix a
template <class T, int kLanes>
NF_DEVICE void transposed_columns(const WeightCall& call, const WeightEntry& e, AccumulatorOf<T> scale, uint32_t block) {
    using A = AccumulatorOf<T>;
    const WeightView view = view_of(e);
    const uint32_t all = view.B / kLanes, width = columns_of_block(view, kLanes), slabs = cut(all, width);
    const uint32_t a = block / slabs, rows = weight_threads / width, row = thread_index() / width, lane = thread_index() % width;
    const uint32_t column = (block - a * slabs) * width + lane;
    const bool active = row < rows && column < all;
    const Global<const T> weight(e.tensors[0]);
    const Global<A> t = Global<A>(call.t).advance(e.rows);
    A sums[kLanes] = {};
    if (active) {
        constexpr int kBatch = 4;
        const int64_t start = int64_t(a) * view.R * view.B + int64_t(column) * kLanes;
        for (uint32_t first = row; first < view.R; first += kBatch * rows) {
            Pack<T, kLanes> values[kBatch];
            A u[kBatch];
            NF_UNROLL
            for (int k = 0; k < kBatch; ++k) {
                const uint32_t r = first + k * rows;
                if (r >= view.R) continue;
                values[k] = weight.template load<kLanes>(start + int64_t(r) * view.B);
                u[k] = scale * t.load_coherent(r);
            }
            NF_UNROLL
            for (int k = 0; k < kBatch; ++k) {
                if (first + k * rows >= view.R) continue;
                NF_UNROLL
                for (int j = 0; j < kLanes; ++j) sums[j] = fma_(A(widen(values[k].data[j])), u[k], sums[j]);
            }
        }
    }
    // the threads of a column by halves
    const Shared<A> table = shared_at<A>(table_offset<A>, weight_threads * kLanes);
    const int at = int(thread_index()) * kLanes;
    NF_UNROLL
    for (int j = 0; j < kLanes; ++j) table.set(at + j, sums[j]);
    uint32_t half = 1;
    while (half < rows) half *= 2;
    for (half /= 2; half > 0; half /= 2) {
        sync_block();
        if (row < half && row + half < rows) {
            NF_UNROLL
            for (int j = 0; j < kLanes; ++j) {
                sums[j] += table.get(at + int(half * width) * kLanes + j);
                table.set(at + j, sums[j]);
            }
        }
    }
    A square = 0;
    if (active && row == 0) {
        const Global<A> s = Global<A>(call.s).advance(e.columns);
        NF_UNROLL
        for (int j = 0; j < kLanes; ++j) {
            s.store(a * view.B + column * kLanes + j, sums[j]);
            square = fma_(sums[j], sums[j], square);
        }
    }
    leave_sum(call, square);
}

template <class T> NF_KERNEL(weight_threads) transposed_matvec_kernel(NF_GRID_CONSTANT WeightCall call) {
    using A = AccumulatorOf<T>;
    const WeightEntry& e = entry_of_block(call);
    const uint32_t block = block_index() - e.first, lanes = lanes_of<T>(e);
    const A norm = sqrt_(sum_of_blocks<A>(call, e.sums, row_blocks(view_of(e), lanes)));
    const A scale = A(1) / at_least(norm, A(call.eps));
    if (block == 0) {
        const Global<A> t = Global<A>(call.t).advance(e.rows);
        for (uint32_t r = thread_index(); r < e.view.R; r += weight_threads) {
            const A u = scale * t.load_coherent(r);
            Global<A>(call.u).store(e.rows + r, u);
            Global<T>(e.tensors[1]).store(r, narrow<T>(u));
        }
    }
    if (lanes == 1) transposed_columns<T, 1>(call, e, scale, block);
    else transposed_columns<T, vector_size<T>>(call, e, scale, block);
}

// body(vector of the weight) for the vectors of a chunk, several loads under way
template <class T, int kLanes, int kTensors, class Body>
NF_DEVICE void over_chunk(const WeightView& view, uint32_t block, const Global<const T> (&from)[kTensors], const Body& body) {
    const uint32_t chunk = chunk_of(view, vector_size<T>), start = block * chunk;
    const uint32_t count = (view.numel() - start < chunk ? view.numel() - start : chunk) / kLanes;
    constexpr int kBatch = 4;
    for (uint32_t first = thread_index(); first < count; first += kBatch * weight_threads) {
        Pack<T, kLanes> values[kBatch][kTensors];
        NF_UNROLL
        for (int k = 0; k < kBatch; ++k) {
            const uint32_t i = first + k * weight_threads;
            if (i >= count) continue;
            NF_UNROLL
            for (int j = 0; j < kTensors; ++j) values[k][j] = from[j].template load<kLanes>(start + int64_t(i) * kLanes);
        }
        NF_UNROLL
        for (int k = 0; k < kBatch; ++k) {
            const uint32_t i = first + k * weight_threads;
            if (i < count) body(start + i * kLanes, values[k]);
        }
    }
}

template <class T, int kLanes>
NF_DEVICE void scale_chunk(const WeightEntry& e, const WeightView& view, AccumulatorOf<T> factor, uint32_t block) {
    const Global<const T> from[1] = {Global<const T>(e.tensors[0])};
    const Global<T> to(e.tensors[3]);
    over_chunk<T, kLanes>(view, block, from, [&](uint32_t at, const Pack<T, kLanes>(&values)[1]) {
        Pack<T, kLanes> out;
        NF_UNROLL
        for (int j = 0; j < kLanes; ++j) out.data[j] = narrow<T>(factor * widen(values[0].data[j]));
        to.template store<kLanes>(at, out);
    });
}

// w = W/sigma. The first block of a weight also leaves v and sigma, and u where no iteration did.
template <class T> NF_KERNEL(weight_threads) scale_kernel(NF_GRID_CONSTANT WeightCall call) {
    using A = AccumulatorOf<T>;
    const WeightEntry& e = entry_of_block(call);
    const WeightView view = view_of(e);
    const uint32_t block = block_index() - e.first, lanes = lanes_of<T>(e);
    const A sum = sum_of_blocks<A>(call, e.sums, call.iterates ? column_blocks(view, lanes) : row_blocks(view, lanes));
    A sigma = sum, divisor = 1;
    if (call.iterates) {
        const A norm = sqrt_(sum);
        divisor = at_least(norm, A(call.eps));
        sigma = norm * (norm / divisor);
    }
    if (block == 0) {
        if (thread_index() == 0) Global<A>(call.sigma).store(call.first_weight + uint32_t(&e - call.entries), sigma);
        const Global<A> v = Global<A>(call.v).advance(e.columns), s = Global<A>(call.s).advance(e.columns);
        const Global<T> kept(e.tensors[2]);
        for (uint32_t m = thread_index(); m < view.columns(); m += weight_threads) {
            if (call.iterates) {
                const A value = s.load_coherent(m) / divisor;
                v.store(view.column_of(m), value);
                kept.store(view.column_of(m), narrow<T>(value));
            } else {
                v.store(m, A(widen(kept.load_coherent(m))));
            }
        }
        if (!call.iterates)
            for (uint32_t r = thread_index(); r < view.R; r += weight_threads)
                Global<A>(call.u).store(e.rows + r, A(widen(Global<T>(e.tensors[1]).load_coherent(r))));
    }
    if (lanes == 1) scale_chunk<T, 1>(e, view, A(1) / sigma, block);
    else scale_chunk<T, vector_size<T>>(e, view, A(1) / sigma, block);
}

template <class T, int kLanes> NF_DEVICE AccumulatorOf<T> chunk_product(const WeightEntry& e, uint32_t block) {
    using A = AccumulatorOf<T>;
    const Global<const T> from[2] = {Global<const T>(e.tensors[0]), Global<const T>(e.tensors[1])};
    A sum = 0;
    over_chunk<T, kLanes>(view_of(e), block, from, [&](uint32_t, const Pack<T, kLanes>(&values)[2]) {
        NF_UNROLL
        for (int j = 0; j < kLanes; ++j) sum = fma_(A(widen(values[0].data[j])), A(widen(values[1].data[j])), sum);
    });
    return sum;
}

template <class T> NF_KERNEL(weight_threads) inner_product_kernel(NF_GRID_CONSTANT WeightCall call) {
    const WeightEntry& e = entry_of_block(call);
    const uint32_t block = block_index() - e.first;
    leave_sum(call, lanes_of<T>(e) == 1 ? chunk_product<T, 1>(e, block) : chunk_product<T, vector_size<T>>(e, block));
}

template <class T, int kLanes>
NF_DEVICE void gradient_chunk(const WeightCall& call, const WeightEntry& e, AccumulatorOf<T> p, AccumulatorOf<T> q, uint32_t block) {
    using A = AccumulatorOf<T>;
    const WeightView view = view_of(e);
    const Global<const T> from[1] = {Global<const T>(e.tensors[0])};
    const Global<T> to(e.tensors[2]);
    const Global<const A> u(call.u), v(call.v);
    over_chunk<T, kLanes>(view, block, from, [&](uint32_t at, const Pack<T, kLanes>(&values)[1]) {
        // a vector lies in one row
        const uint32_t run = at / view.B, a = view.A == 1 ? 0 : run / view.R, r = run - a * view.R;
        const uint32_t m = a * view.B + at - run * view.B;
        const A of_row = q * u.load(e.rows + r);
        Pack<T, kLanes> out;
        NF_UNROLL
        for (int j = 0; j < kLanes; ++j)
            out.data[j] = narrow<T>(fma_(of_row, v.load(e.columns + view.column_of(m + j)), p * widen(values[0].data[j])));
        to.template store<kLanes>(at, out);
    });
}

template <class T> NF_KERNEL(weight_threads) spectral_gradient_kernel(NF_GRID_CONSTANT WeightCall call) {
    using A = AccumulatorOf<T>;
    const WeightEntry& e = entry_of_block(call);
    const uint32_t block = block_index() - e.first;
    const A product = sum_of_blocks<A>(call, e.sums, chunks_of(view_of(e), vector_size<T>));
    const A p = A(1) / Global<const A>(call.sigma).load(call.first_weight + uint32_t(&e - call.entries)), q = -product * p * p;
    if (lanes_of<T>(e) == 1) gradient_chunk<T, 1>(call, e, p, q, block);
    else gradient_chunk<T, vector_size<T>>(call, e, p, q, block);
}

}  // namespace normfused
