// A slab: the part of a matrix (walk.h) that one block holds, and the order in which its threads meet the vectors of it.
//
// A thread walks its vectors in batches of K. The first pass reads each from memory; the last batch then still lies in registers,
// the ``resident`` ones before it in shared memory, and whatever came earlier is read again. The second pass goes backwards, so
// that what is read again was read last. One body serves the single pass (all resident) and the passes that stream (none).
//
// Rows, columns and offsets are counted from the slab's corner and fit 32 bits (plan.h sees to it); only the corner is a 64-bit offset.
#pragma once

#include "integers.cuh"
#include "pack.cuh"
#include "walk.h"

namespace normfused {

// One vector of a slab: elements at .. at + V - 1 from its corner on. In a regular walk all of them belong to the slab, or none; else lanes
// [first, last)
template <bool kRegular> struct Spot {
    uint32_t at;
    int row, column;  // of lane 0; the column is negative where a wide run starts off a 16-byte boundary
    int first, last;
    bool aligned;  // to 16 bytes

    NF_DEVICE bool empty() const { return last == 0; }
    NF_DEVICE int lanes() const { return last - first; }
    template <int V> NF_DEVICE bool full() const { return kRegular || lanes() == V; }  // of one that is not empty
    NF_DEVICE bool has(int j) const { return kRegular || (j >= first && j < last); }    // likewise
};

template <class T, bool kWide> struct Slab {
    static constexpr int V = vector_size<T>;

    int64_t corner;  // element of row 0, column 0, or (ragged) the 16-byte boundary before it
    uint32_t skew;   // from there to row 0, column 0
    int64_t outer;
    int64_t row0;               // of the matrix
    int column0, vector0;       // of the matrix (its columns are channels, or counted by vectors), of the mask's row
    int channel0, chunk;
    int rows, columns, least_column;
    int vectors, per_row, steps;  // of a row; that a thread meets in a row, in all rows. Absent ones at the edges counted
    int team, teams, lane, behind;  // this thread is number ``lane`` of its team, from which on there are ``behind``
    int before;                     // narrow, where teams keep to a sample each: the slab's rows before its sample
    int set_in_block;
    uint32_t row_stride, phase_mask;
    const int64_t& elements;  // of the tensor; where kernels are given it, which takes no register
    bool live, aligned, regular;  // regular: every vector is 16 bytes on a 16-byte boundary, or absent

    struct Cursor {
        int row, vector;
    };

    NF_DEVICE Slab(const Walk& w, int64_t unit) : elements(w.elements) {
        team = w.team;
        teams = w.teams;
        aligned = w.aligned;
        regular = w.regular && w.aligned;
        phase_mask = w.phase_mask;
        int thread = int(thread_index());
        set_in_block = 0;
        int64_t first_column = 0;
        if (kWide) {
            if (w.sets_per_block > 1) {
                set_in_block = thread / (team * teams);
                thread -= set_in_block * team * teams;
            }
            const int64_t block_sets = quotient(unit, w.chunks);
            chunk = int(unit - block_sets * w.chunks);
            outer = block_sets * w.sets_per_block + set_in_block;
            live = outer < w.outers;
        } else {
            const int64_t fast = w.chunks_adjoin ? w.chunks : w.slices, slow = w.chunks_adjoin ? w.slices : w.chunks;
            const int64_t rest = quotient(unit, fast);
            outer = quotient(rest, slow);
            const int64_t at_fast = unit - rest * fast, at_slow = rest - outer * slow;
            chunk = int(w.chunks_adjoin ? at_fast : at_slow);
            first_column = (w.chunks_adjoin ? at_slow : at_fast) * w.slice;
            live = true;
        }
        int number = thread / team;
        lane = thread - number * team;
        const int sample = !kWide && w.samples > 1 ? min_(number / teams, w.samples - 1) : 0;
        number -= sample * teams;
        behind = teams - number;
        before = int(sample * w.sample_rows);
        const int64_t high = quotient(outer, w.period), low = outer - high * w.period;
        const int row_chunk = chunk / w.vector_chunks, vector_chunk = chunk - row_chunk * w.vector_chunks;
        const int first_sample = kWide ? 0 : row_chunk / w.pieces * w.samples;
        const int64_t cut = int64_t(kWide ? row_chunk : row_chunk % w.pieces) * w.chunk_rows;
        row0 = first_sample * w.sample_rows + cut;
        first_column += int64_t(vector_chunk) * w.chunk_vectors * V;
        corner = high * w.high_stride + low * w.low_stride + row0 * w.row_stride + first_column;
        skew = uint32_t(corner) & phase_mask;
        corner -= skew;
        row_stride = uint32_t(w.row_stride);
        channel0 = int(low * w.low_channels);
        column0 = int(first_column);  // used where columns are channels or sets, which are fewer than 2^31
        vector0 = int(first_column / V);
        // threads that fill up the last warp, and groups without a set, have no rows
        rows = live && behind > 0 ? int(before + min_(min_(w.rows - row0 - before, w.sample_rows - cut), int64_t(w.chunk_rows))) : 0;
        const int64_t left = (kWide ? w.cols : min_(w.cols, first_column + w.slice)) - first_column;
        columns = int(min_(left, int64_t(w.chunk_vectors) * V + V));
        least_column = vector_chunk == 0 ? 0 : -V;
        vectors = min_(w.chunk_vectors, w.row_vectors - vector0);
        // the same number of steps for every thread of the launch, since there are barriers between them
        per_row = w.per_row;
        steps = w.steps;
    }

    NF_DEVICE int row_lane() const { return teams - behind; }  // this thread's team
    NF_DEVICE int first_row() const { return kWide ? row_lane() : before + row_lane(); }
    NF_DEVICE Cursor start() const { return {first_row(), lane}; }
    NF_DEVICE Cursor after(int steps_done) const {
        const int rows_done = steps_done / per_row;
        return {first_row() + rows_done * teams, lane + (steps_done - rows_done * per_row) * team};
    }
    NF_DEVICE bool has(const Cursor& c) const { return c.row < rows && c.vector < vectors; }
    NF_DEVICE bool row_ends(const Cursor& c) const { return c.vector + team >= per_row * team; }
    NF_DEVICE void advance(Cursor& c) const {
        c.vector += team;
        carry(c.vector, per_row * team, c.row, teams);
    }
    NF_DEVICE void retreat(Cursor& c) const {
        c.vector -= team;
        borrow(c.vector, per_row * team, c.row, teams);
    }

    template <bool kRegular = false> NF_DEVICE Spot<kRegular> spot(const Cursor& c) const {
        Spot<kRegular> s;
        const uint32_t run = skew + uint32_t(c.row) * row_stride, phase = kWide && !kRegular ? run & phase_mask : 0;
        s.row = c.row;
        s.column = c.vector * V - int(phase);
        s.at = run - phase + uint32_t(c.vector) * V;
        s.aligned = kRegular || aligned;
        s.first = kRegular ? 0 : max_(least_column - s.column, 0);
        s.last = kRegular ? V : min_(columns - s.column, V);
        if (!has(c) || (!kRegular && s.last <= s.first)) s.first = s.last = 0;
        return s;
    }

    // work(cursors, spots) of the next batch of the walk, or the one before; its vectors in the walk's order. ``kTells``: whether there is
    // code of its own for regular walks
    template <int K, bool kTells, class Work> NF_DEVICE void next(Cursor& c, const Work& work) const {
        if (kTells && regular) batch_after<K, kTells>(c, work);
        else batch_after<K, false>(c, work);
    }
    template <int K, bool kTells, class Work> NF_DEVICE void previous(Cursor& c, const Work& work) const {
        if (kTells && regular) batch_before<K, kTells>(c, work);
        else batch_before<K, false>(c, work);
    }
    template <int K, bool kRegular, class Work> NF_DEVICE void batch_after(Cursor& c, const Work& work) const {
        Cursor cursors[K];
        Spot<kRegular> spots[K];
        NF_UNROLL
        for (int k = 0; k < K; ++k) {
            cursors[k] = c;
            spots[k] = spot<kRegular>(c);
            advance(c);
        }
        work(cursors, spots);
    }
    template <int K, bool kRegular, class Work> NF_DEVICE void batch_before(Cursor& c, const Work& work) const {
        Cursor cursors[K];
        Spot<kRegular> spots[K];
        NF_UNROLL
        for (int k = K - 1; k >= 0; --k) {
            retreat(c);
            cursors[k] = c;
            spots[k] = spot<kRegular>(c);
        }
        work(cursors, spots);
    }

    // Whether 16 bytes may be read: all of them are of the slab, or of the row's neighbours too, where rows are walked by the vectors of
    // memory, at their ends
    template <bool kNeighbours, bool kRegular> NF_DEVICE bool readable(const Spot<kRegular>& s) const {
        if (kRegular) return !s.empty();
        if (!s.aligned || s.empty()) return false;
        return s.lanes() == V || (kNeighbours && kWide && phase_mask != 0 && corner + s.at + V <= elements);
    }
    template <bool kRegular> NF_DEVICE void clear_outside(const Spot<kRegular>& s, Vector<T>& v) const {
        if (s.template full<V>()) return;
        v.keep([&](int j) { return s.has(j); });
    }

    NF_DEVICE Global<const T> at_corner(const void* tensor) const { return Global<const T>(tensor).advance(corner); }

    // Of a tensor, or of one whose corner is known already. Lanes outside are zero, or (``kNeighbours``) what lies there
    template <bool kCoherent = false, bool kNeighbours = true, bool kRegular>
    NF_DEVICE Vector<T> load(const void* tensor, const Spot<kRegular>& s) const {
        return load<kCoherent, kNeighbours>(at_corner(tensor), s);
    }
    template <bool kCoherent = false, bool kNeighbours = true, bool kRegular>
    NF_DEVICE Vector<T> load(const Global<const T>& from_corner, const Spot<kRegular>& s) const {
        const Global<const T> from = from_corner.advance(s.at);
        Pack<uint32_t, 4> words = {};  // opaque: device.cuh says why
        if (readable<(kNeighbours && !kCoherent)>(s)) {
            words = words_of(kCoherent ? from.template load_coherent<V>(0) : from.template load<V>(0));
        } else if (!kRegular) {
            Pack<T, V> v;
            NF_UNROLL
            for (int j = 0; j < V; ++j) {
                v.data[j] = narrow<T>(0);
                if (s.has(j)) v.data[j] = kCoherent ? from.load_coherent(j) : from.load(j);
            }
            words = opaque(words_of(v));
        }
        return Vector<T>(opaque(words));
    }

    // P lanes of it from lane ``part`` on; those outside are zero
    template <int P, bool kRegular> NF_DEVICE Pack<T, P> load_part(const void* tensor, const Spot<kRegular>& s, int part) const {
        const Global<const T> from = Global<const T>(tensor).advance(corner).advance(s.at);
        if (readable<false>(s)) return from.template load<P>(part);
        Pack<T, P> v;
        NF_UNROLL
        for (int j = 0; j < P; ++j) v.data[j] = s.has(part + j) ? from.load(part + j) : narrow<T>(0);
        return v;
    }

    // The same into shared memory; to be awaited (copy_async_wait) before this thread reads it there. An absent vector leaves its place
    template <bool kNeighbours = true, bool kRegular>
    NF_DEVICE void fetch(const Global<const T>& from_corner, const Spot<kRegular>& s, const Shared<T>& to, int i, Cache cache) const {
        if (readable<kNeighbours>(s)) copy_async<V>(to, i, from_corner, int64_t(s.at), cache);
        else if (!kRegular && !s.empty()) to.template store<V>(i, load<false, kNeighbours>(from_corner, s).pack());
    }

    template <bool kRegular>
    NF_DEVICE void store(void* tensor, const Spot<kRegular>& s, const Vector<T>& v, Cache cache = Cache::normal) const {
        if (s.empty()) return;
        const Global<T> to = Global<T>(tensor).advance(corner).advance(s.at);
        if (kRegular || readable<false>(s)) return to.template store<V>(0, v.pack(), cache);
        NF_UNROLL
        for (int j = 0; j < V; ++j)
            if (s.has(j)) to.store(j, v.pack().data[j]);
    }

    // The mask has one byte per vector of every row, in strips of 2^mask_shift vectors: [outer][strip][row][vector of the strip, which is
    // narrower at the end]; wide sets have one strip
    NF_DEVICE int64_t mask_at(const Walk& w, const Cursor& c) const {
        const int vector = vector0 + c.vector;
        if (kWide)
            return (outer * w.rows + row0) * w.row_vectors + vector0 + (uint32_t(c.row) * uint32_t(w.row_vectors) + uint32_t(c.vector));
        const int before = vector >> w.mask_shift << w.mask_shift, strip = min_(1 << w.mask_shift, w.row_vectors - before);
        return (outer * w.row_vectors + before) * w.rows + (row0 + c.row) * strip + (vector - before);
    }

    NF_DEVICE int64_t row_channel(const Walk& w, int row) const { return channel0 + (row0 + row) * w.row_channels; }

    // Column of a lane of this thread, where every thread keeps its columns (narrow)
    NF_DEVICE int column(int j) const { return lane * V + j; }
    NF_DEVICE bool has(int j) const { return live && (kWide || column(j) < columns); }
    NF_DEVICE int64_t set(const Walk& w, int j) const {
        return kWide ? outer : outer * w.sets_per_outer + set_of_column(w, uint32_t(column0 + column(j)));
    }
    static NF_DEVICE int set_of_column(const Walk& w, uint32_t column) {
        return int(w.width == 1 ? column : uint32_t(column * w.width_inverse >> 40));
    }
    NF_DEVICE int sets(const Walk& w) const { return kWide ? 1 : int(columns / w.width); }
    NF_DEVICE int64_t first_set(const Walk& w) const { return kWide ? outer : outer * w.sets_per_outer + column0 / w.width; }
    // The one thread that speaks for a set (wide), or for the columns of its lanes
    NF_DEVICE bool speaks() const { return live && row_lane() == 0 && (!kWide || lane == 0); }
};

}  // namespace normfused
