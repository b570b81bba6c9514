// From the values of threads to the values of sets: always in the same order, so that the bits are the same in every run.
//
// A value is a small array of numbers that knows how to merge with another one (Moments, Sums). Three reductions:
//   over_set     wide sets: over all threads of a set, by shuffles and one exchange between warps; every thread gets the result
//   over_team    over the threads of a team, for sums per row
//   over_rows    narrow sets: over the rows of a table of values per column; one thread per column gets the result
#pragma once

#include "integers.cuh"

namespace normfused {

// Mean and sum of squared deviations of ``count`` numbers; merge: Chan, Golub & LeVeque 1979. The mean is kept as a number
// near it plus an offset: the difference of two such is exact or nearly so, and a large mean takes no digits from the squared deviations.
template <class A> struct Moments {
    static constexpr int size = 4;
    A element = 0, offset = 0, m2 = 0, count = 0;

    NF_DEVICE A mean() const { return element + offset; }
    NF_DEVICE A get(int i) const { return i == 0 ? element : i == 1 ? offset : i == 2 ? m2 : count; }
    NF_DEVICE void set(int i, A v) { (i == 0 ? element : i == 1 ? offset : i == 2 ? m2 : count) = v; }
    NF_DEVICE void merge(const Moments& b) {
        if (b.count == A(0)) return;
        if (count == A(0)) {
            *this = b;
            return;
        }
        const A n = count + b.count, share = b.count / n;
        const A delta = (b.element - element) + (b.offset - offset);
        offset = fma_(delta, share, offset);
        m2 = m2 + fma_(delta * delta, count * share, b.m2);
        count = n;
    }
};

template <class A, int kSize> struct Sums {
    static constexpr int size = kSize;
    A of[kSize] = {};

    NF_DEVICE A get(int i) const { return of[i]; }
    NF_DEVICE void set(int i, A v) { of[i] = v; }
    NF_DEVICE void merge(const Sums& b) {
        NF_UNROLL
        for (int i = 0; i < kSize; ++i) of[i] += b.of[i];
    }
};

// Over groups of ``threads`` (a power of two, at most 32) neighbouring lanes, or of every ``step``-th of them. The lower lane's value
// always comes first.
template <class Value> NF_DEVICE Value over_lanes(Value v, int threads, int step = 1) {
    NF_NO_UNROLL
    for (int mask = step; mask < threads; mask *= 2) {
        Value other;
        NF_UNROLL
        for (int i = 0; i < Value::size; ++i) other.set(i, shuffle_xor(v.get(i), mask));
        if (lane_index() & unsigned(mask)) {
            other.merge(v);
            v = other;
        } else {
            v.merge(other);
        }
    }
    return v;
}

// ``threads``: a power of two up to 32, or all threads of the block (whole warps). scratch: Value::size * 32 numbers at ``offset``.
template <class A, class Value> NF_DEVICE Value over_set(Value v, int threads, int offset) {
    v = over_lanes(v, min_(threads, 32));
    if (threads <= 32) return v;
    const Shared<A> scratch = shared_at<A>(offset, Value::size * 32);
    const int warps = threads / 32, lane = int(lane_index());
    if (lane == 0) {
        NF_UNROLL
        for (int i = 0; i < Value::size; ++i) scratch.set(i * 32 + int(warp_index()), v.get(i));
    }
    sync_block();
    Value other;
    if (lane < warps) {
        NF_UNROLL
        for (int i = 0; i < Value::size; ++i) other.set(i, scratch.get(i * 32 + lane));
    }
    other = over_lanes(other, 32);
    sync_block();  // before the scratch is used again
    return other;
}

// Over the threads of each team (a power of two; teams of more than 32 are whole warps). scratch: Value::size * 32 numbers.
template <class A, class Value> NF_DEVICE Value over_team(Value v, int team, int offset) {
    v = over_lanes(v, min_(team, 32));
    if (team <= 32) return v;
    const Shared<A> scratch = shared_at<A>(offset, Value::size * 32);
    const int warps = team / 32, warp = int(warp_index());
    if (lane_index() == 0) {
        NF_UNROLL
        for (int i = 0; i < Value::size; ++i) scratch.set(i * 32 + warp, v.get(i));
    }
    sync_block();
    const int first = warp / warps * warps;
    Value sum;
    for (int k = 0; k < warps; ++k) {
        Value other;
        NF_UNROLL
        for (int i = 0; i < Value::size; ++i) other.set(i, scratch.get(i * 32 + first + k));
        if (k == 0) sum = other;
        else sum.merge(other);
    }
    sync_block();
    return sum;
}

// A table in shared memory: a value for every (row, column)
template <class A, class Value> struct Table {
    Shared<A> numbers;
    int columns;

    NF_DEVICE Table(int offset, int rows, int columns_) : numbers(shared_at<A>(offset, Value::size * rows * columns_)), columns(columns_) {}
    NF_DEVICE Table on_block(unsigned rank) const {
        Table other = *this;
        other.numbers = numbers.on_block(rank);
        return other;
    }
    NF_DEVICE int slot(int row, int i, int column) const { return (row * Value::size + i) * columns + column; }
    NF_DEVICE Value get(int row, int column) const {
        Value v;
        NF_UNROLL
        for (int i = 0; i < Value::size; ++i) v.set(i, numbers.get(slot(row, i, column)));
        return v;
    }
    NF_DEVICE void set(int row, int column, const Value& v) const {
        NF_UNROLL
        for (int i = 0; i < Value::size; ++i) numbers.set(slot(row, i, column), v.get(i));
    }
};

// on_column(column, sum of read(0 .. rows - 1, column)) by one thread per column. The threads first share out the rows and meet in the
// table at ``offset``, whose first rows read() may read too. Ends without a barrier.
template <class A, class Value, class Read, class OnColumn>
NF_DEVICE void over_rows(int rows, int columns, int offset, const Read& read, const OnColumn& on_column) {
    const int threads = int(block_threads()), thread = int(thread_index()), parts = max_(1, min_(rows, threads / columns));
    const Table<A, Value> table(offset, parts, columns);
    if (parts > 1) {
        const int part = thread / columns, column = thread - part * columns;
        if (part < parts) {
            Value sum = read(part, column);
            NF_NO_UNROLL
            for (int row = part + parts; row < rows; row += parts) sum.merge(read(row, column));
            table.set(part, column, sum);
        }
        sync_block();
    }
    NF_NO_UNROLL
    for (int column = thread; column < columns; column += threads) {
        Value sum = parts > 1 ? table.get(0, column) : read(0, column);
        NF_NO_UNROLL
        for (int row = 1; row < (parts > 1 ? parts : rows); ++row) sum.merge(parts > 1 ? table.get(row, column) : read(row, column));
        on_column(column, sum);
    }
}

}  // namespace normfused
