// How a call is run: a pure function of the problem and of the device's limits, testable without a GPU.
//
// Routes: single_pass where a block, a cluster or a group of blocks can hold its sets on chip between the two passes over them (position
// sets: a block), else two_pass (a launch per pass). Constants without a measurement behind them say so.
#pragma once

#include <algorithm>
#include <numeric>

#include "call.h"

namespace normfused {

enum class Route : int { single_pass, two_pass, apply_only };
// Beside the first two routes, what tests and measurements may force: a single pass by sets that several blocks hold
constexpr int by_cluster = 2, by_group = 3;

struct Plan {
    Route route = Route::two_pass;
    bool wide = true, rows = true;
    Walk walk = {};
    int threads = 0;
    int64_t blocks = 0;
    int batch = 0;             // vectors of a thread's batch
    Owner owner = Owner::block;
    int groups = 0;            // of co-resident blocks, each with a set at a time
    int scratch_offset = 0, columns_offset = 0, exchange_offset = 0, sums_offset = -1, shared_bytes = 0;
    bool settles = false;      // narrow sets wider than a slice, or of many chunks, and renorm: a launch merges the partials
    bool columns_pass = false; // position sets' parameter gradients need a pass of their own
    Walk columns_walk = {};
    int columns_threads = 0;
    double read_x = 1;         // how often x is asked for, for explain() and the tests
};

namespace planning {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t power_of_2(int64_t n) {  // the smallest that is at least n
    int64_t p = 1;
    while (p < n) p *= 2;
    return p;
}
constexpr int64_t too_many = int64_t(1) << 31;

struct View {
    bool wide, rows;
    Walk walk;
};

// The view of walk.h, without the cut
inline View view_of(const Problem& p) {
    const int64_t N = p.N, C = p.C, S = p.S, D = C / p.groups, V = vector_of(p.type);
    const bool nhwc = p.layout == Layout::nhwc || S == 1;
    Walk w = {};
    w.period = 1;
    w.elements = p.elements();
    bool wide, rows;
    if (p.scope == Scope::channel && !nhwc) {
        wide = rows = true;
        w.outers = w.period = C;
        w.low_stride = S;
        w.low_channels = 1;
        w.rows = N;
        w.row_stride = C * S;
        w.cols = w.width = S;
        w.sets_per_outer = 1;
        w.one_channel = true;
    } else if (p.scope == Scope::sample_group && !nhwc) {
        wide = rows = true;
        w.outers = N * p.groups;
        w.period = p.groups;
        w.high_stride = C * S;
        w.low_stride = D * S;
        w.low_channels = D;
        w.rows = D;
        w.row_stride = S;
        w.row_channels = 1;
        w.cols = w.width = S;
        w.sets_per_outer = 1;
        w.one_channel = D == 1;
    } else if (p.scope == Scope::position && nhwc) {
        wide = true;
        rows = false;
        w.outers = N * S;
        w.high_stride = C;
        w.rows = 1;
        w.cols = w.width = C;
        w.sets_per_outer = 1;
    } else if (p.scope == Scope::position) {
        wide = false;
        rows = true;
        w.outers = N;
        w.high_stride = C * S;
        w.rows = C;
        w.row_stride = S;
        w.row_channels = 1;
        w.cols = S;
        w.width = 1;
        w.sets_per_outer = S;
    } else {
        wide = rows = false;
        const bool groups = p.scope == Scope::sample_group;
        w.outers = groups ? N : 1;
        w.high_stride = groups ? S * C : 0;
        w.rows = groups ? S : N * S;
        w.row_stride = w.cols = C;
        w.width = groups ? D : 1;
        w.sets_per_outer = groups ? p.groups : C;
    }
    const bool ragged = wide && rows && S % V != 0 && w.outers * w.rows > 1;
    w.phase_mask = ragged ? uint32_t(V - 1) : 0;
    w.row_vectors = int(ragged ? (w.cols + 2 * V - 2) / V : ceil_div(w.cols, V));
    w.aligned = (wide && rows) || (w.row_stride % V == 0 && w.high_stride % V == 0);
    w.width_inverse = ((uint64_t(1) << 40) + uint64_t(w.width) - 1) / uint64_t(w.width);
    w.mask_shift = wide ? 30 : 2;
    w.sets_per_block = 1;
    w.chunks = w.vector_chunks = 1;
    w.slices = 1;
    return {wide, rows, w};
}

// Threads to a slab of rows x row_vectors, ``want`` vectors to a thread. Rows of several channels need teams of a power of two.
inline void share_out(Walk& w, int64_t rows, int row_vectors, int want, bool power, int most) {
    const int64_t vectors = rows * row_vectors;
    const int threads = int(std::min<int64_t>(most, std::max<int64_t>(32, round_up(ceil_div(vectors, want), 32))));
    int best_team = 1, best_teams = threads;
    int64_t best = INT64_MAX;
    const auto consider = [&](int team) {
        if (team < 1 || team > threads) return;
        const int teams = int(std::min<int64_t>(threads / team, rows));
        const int64_t steps = ceil_div(row_vectors, team) * ceil_div(rows, teams);
        if (steps < best || (steps == best && team > best_team)) best = steps, best_team = team, best_teams = teams;
    };
    for (int team = 1; team <= threads; team *= 2) consider(team);
    if (!power)
        for (int parts = 1; parts <= 8; ++parts) consider(int(ceil_div(row_vectors, parts)));
    w.team = best_team;
    w.teams = best_teams;
}

// Threads to a narrow slab: teams of a row's vectors each, a batch to a thread at least
inline void share_rows(Walk& w, int64_t rows, int batch, int most) {
    w.teams = int(std::max<int64_t>(1, std::min<int64_t>(std::max(w.team, most) / w.team, ceil_div(rows, batch))));
}

// Slabs of a wide set for at most ``chunks`` blocks (``exactly``: as many, some perhaps empty; then chunks is a power of two), as equal as
// whole rows and vectors allow. Rows are split where that makes a tenth: longer runs of memory are better, and each piece of a row has
// sums per channel of its own.
inline void cut(Walk& w, int64_t chunks, bool exactly) {
    int64_t least = INT64_MAX, taken = 1;
    const auto rows_of = [&](int64_t pieces) { return ceil_div(w.rows, std::min(w.rows, chunks / pieces)); };
    const auto vectors_of = [&](int64_t pieces) {  // pieces of whole lines of 128 bytes, where they are not tiny
        const int64_t vectors = ceil_div(w.row_vectors, pieces);
        return pieces > 1 && vectors >= 64 ? round_up(vectors, 8) : vectors;
    };
    const auto consider = [&](int64_t pieces) {
        if (pieces < 1 || pieces > chunks || pieces > w.row_vectors) return;
        const int64_t slab = rows_of(pieces) * vectors_of(pieces);
        if (double(slab) < 0.9 * double(least)) least = slab, taken = pieces;
    };
    if (exactly) {
        for (int64_t pieces = 1; pieces <= chunks; pieces *= 2) consider(pieces);
    } else {
        for (int64_t few = 1; few <= 8; ++few) consider(few);
        for (int64_t few = std::min<int64_t>(8, w.rows); few >= 1; --few)
            if (chunks / few > 8) consider(chunks / few);
    }
    w.chunk_rows = int(rows_of(taken));
    w.chunk_vectors = int(vectors_of(taken));
    w.vector_chunks = int(exactly ? taken : ceil_div(w.row_vectors, w.chunk_vectors));
    w.chunks = exactly ? chunks : ceil_div(w.rows, w.chunk_rows) * w.vector_chunks;
}

// Batch-instance norm: slabs for at most ``chunks`` blocks (``exactly`` as in cut), of whole samples, or where there are more blocks than
// samples of pieces of one; and teams that keep to a sample each, of ``want`` vectors to a thread. A team reads 32 bytes at a time at
// least. False where samples outnumber teams.
inline bool keep_apart(Walk& w, const Problem& p, bool wide, int64_t chunks, bool exactly, int want, int V, int most) {
    const auto two_to = [](int64_t n) { return n < 1 ? 0 : power_of_2(n + 1) / 2; };  // the largest power of 2 up to n
    const int64_t samples = ceil_div(p.N, chunks);
    int64_t pieces = std::max<int64_t>(1, chunks / p.N);
    if (wide) {
        w.chunk_vectors = int(ceil_div(w.row_vectors, pieces));
        if (pieces > 1 && w.chunk_vectors >= 64) w.chunk_vectors = int(round_up(w.chunk_vectors, 8));  // whole lines of 128 bytes
        w.vector_chunks = int(exactly ? pieces : ceil_div(w.row_vectors, w.chunk_vectors));
        pieces = w.vector_chunks;
        w.chunk_rows = w.teams = int(std::min(samples, too_many - 1));
        const int64_t useful = ceil_div(w.chunk_vectors, want), least = std::min(2, w.chunk_vectors);
        w.team = int(samples == 1 ? std::min<int64_t>(most, round_up(useful, 32))
                                  : std::min(two_to(most / samples), std::max(least, power_of_2(useful))));
        if (w.team < least) return false;
    } else {
        const int64_t positions = ceil_div(p.S, pieces);
        w.team = int(w.slice / V);
        w.samples = int(std::min(samples, too_many - 1));
        w.sample_rows = p.S;
        w.chunk_rows = int(std::min(positions, too_many - 1));
        w.chunk_vectors = w.team;
        w.pieces = int(exactly ? pieces : ceil_div(p.S, w.chunk_rows));
        pieces = w.pieces;
        const int64_t teams = std::max(most, w.team) / w.team / samples, useful = ceil_div(positions, want);
        w.teams = int(samples == 1 ? std::min(teams, useful) : std::min(two_to(teams), power_of_2(useful)));
        if (w.teams < 1) return false;
    }
    w.chunks = exactly ? chunks : ceil_div(p.N, samples) * pieces;
    return true;
}

inline void finish_walk(Walk& w, bool wide, int V) {
    if (w.samples == 0) {
        w.samples = 1;
        w.sample_rows = w.rows;
        w.pieces = int(w.chunks);
    }
    w.per_row = int(ceil_div(w.chunk_vectors, w.team));
    w.steps = int(ceil_div(w.chunk_rows, w.teams)) * w.per_row;
    w.units = wide ? ceil_div(w.outers, w.sets_per_block) * w.chunks : w.outers * w.chunks * w.slices;
    w.regular = w.phase_mask == 0 && w.cols % V == 0;
    w.row_key = -int(w.row_channels);
    w.folds = !wide && w.team < 32 && power_of_2(w.team) == w.team;
}

// Columns of a narrow slab: whole sets of about ``bytes``, whole sectors where sets and rows allow. 0: a set is wider than a team of the
// most threads can hold.
inline int64_t slice_of(const Walk& w, Type type, int64_t bytes) {
    const int64_t V = vector_of(type), sector = 32 / size_of(type), all = round_up(w.cols, V);
    const auto fits = [&](int64_t columns) { return columns / V <= threads_of<false>; };
    if (w.width == w.cols) return fits(all) ? all : 0;
    int64_t least = std::lcm(w.cols % sector == 0 ? sector : V, w.width);
    if (least > 8 * sector) least = std::lcm(V, w.width);  // a part of a sector at either end is less than more sums to exchange
    int64_t slice = least * std::max<int64_t>(1, bytes / size_of(type) / least);
    if (slice >= w.cols) slice = std::max(all, least);
    return fits(slice) ? slice : 0;
}

}  // namespace planning

// ``pool``: whether arrival words can be had; ``forced_route``: a Route to take where it can be, for tests and measurements
inline Plan choose_plan(Problem p, Step step, const Needs& needs, const Limits& limits, bool pool, int forced_route = -1) {
    using namespace planning;
    // nothing is launched for a tensor without elements, but its plan is asked for
    for (int64_t* length : {&p.N, &p.S, &p.groups}) *length = std::max<int64_t>(*length, 1);
    p.C = std::max(p.C, p.groups);
    const View view = view_of(p);
    const int V = vector_of(p.type), accumulator = p.type == Type::float64 ? 8 : 4;
    const bool backward = step == Step::norm_act_backward || step == Step::grad_moments || step == Step::grad_apply;
    const bool position = p.scope == Scope::position;
    const int batch = backward ? gradient_batch : forward_batch;
    const bool apart = p.rule == Rule::batch_instance;  // teams keep to a sample
    const int values = !backward ? 4 : (own_instantiation(p) ? 2 : 3) + apart;  // numbers that reductions carry
    Plan plan;
    plan.wide = view.wide;
    plan.rows = view.rows;
    plan.batch = batch;

    // what has to stay on chip: x, or dy and x and what z is recomputed from
    const bool source = backward && p.residual_mode == ResidualMode::pre_act && p.act != Act::identity;
    const int vector_bytes = backward ? 32 + (source ? (p.masked() ? 1 : 16) : 0) : 16;
    const bool sums_needed = !backward || p.batch_statistics || needs.parameters || apart;

    const auto table_rows = [&](const Plan& at) {
        return apart ? at.walk.samples * at.walk.rows_of_sample() : at.walk.folds ? at.threads / 32 : at.walk.teams;
    };
    const auto memory = [&](Plan& at) -> int64_t {  // offsets behind the slab; the reductions of wide sets need one exchange between warps
        const Walk& w = at.walk;
        const int64_t slab = round_up(int64_t(w.resident + w.spare) * batch * at.threads * vector_bytes, 16);
        const int64_t lanes = at.wide ? 0 : int64_t(values) * std::max(w.team * V * table_rows(at), at.threads) * accumulator;
        const int64_t tail = backward ? 4 * at.threads * accumulator : 0;  // grad_parameters.cuh in the last block
        const int64_t columns = slab + round_up(std::max<int64_t>({int64_t(values) * 32 * accumulator, lanes, tail}), 16);
        const int64_t exchange = columns + (at.wide ? 0 : round_up(int64_t(2) * w.team * V * accumulator, 16));
        const bool exchanges = at.route == Route::single_pass && (!at.wide || at.owner == Owner::cluster);
        const int64_t sums = exchange + (exchanges ? int64_t(4) * (at.wide ? 1 : w.team * V) * accumulator : 0);
        const int64_t channels = at.wide ? int64_t(w.row_vectors) * V : w.rows;
        const int64_t end = sums + (at.sums_offset < 0 ? 0 : values * channels * w.sets_per_block * accumulator);
        if (end < too_many) {
            at.scratch_offset = int(slab);
            at.columns_offset = int(columns);
            at.exchange_offset = int(exchange);
            if (at.sums_offset >= 0) at.sums_offset = int(sums);
            at.shared_bytes = int(end);
        }
        return end;
    };
    // Offsets from a slab's corner are 32-bit
    const auto spans = [&](const Walk& w) {
        const int64_t before = (w.samples - 1) * w.sample_rows;
        return (before + w.chunk_rows - 1) * w.row_stride + int64_t(w.chunk_vectors) * V < (int64_t(1) << 32) - 64 &&
               before + w.chunk_rows < too_many;
    };

    // ------------------------------------------------------------------------------------------------ single_pass
    const auto single = [&](int64_t slice_bytes) -> bool {
        Plan at = plan;
        Walk& w = at.walk = view.walk;
        at.route = Route::single_pass;
        const bool power = backward && (view.rows && !w.one_channel);
        int row_vectors = w.row_vectors;
        if (view.wide) {
            const int64_t vectors = w.rows * w.row_vectors;
            if (w.rows > (int64_t(1) << 30)) return false;
            // with many sets small blocks, several to a processor, some loading while others sum or store, and as many vectors to a
            // thread as it asks for ahead; few sets share out as widely as they can
            const bool many = w.outers >= 2 * int64_t(limits.processors);
            const int want = many ? batch * (landing_ahead + 1) : batch, most = many ? 256 : threads_of<true>;
            if (apart) {
                if (!keep_apart(w, p, true, 1, false, want, V, most)) return false;
                row_vectors = w.chunk_vectors;
                at.threads = int(round_up(w.team * w.teams, 32));
            } else if (vectors <= 64) {  // several sets to a block, a group of lanes each
                const int group = int(std::min<int64_t>(32, power_of_2(ceil_div(vectors, 2))));
                w.team = int(std::min<int64_t>(group, power_of_2(w.row_vectors)));
                w.teams = group / w.team;
                const int whole_warps = 32 / group;
                w.sets_per_block = int(std::min<int64_t>(128 / group, round_up(ceil_div(w.outers, 2 * limits.processors), whole_warps)));
                at.threads = group * w.sets_per_block;
            } else if (position) {  // a row keeps its threads, so that they keep their columns
                const int per_row = int(ceil_div(w.row_vectors, threads_of<true>));
                w.team = int(round_up(ceil_div(w.row_vectors, per_row), 32));
                w.teams = 1;
                at.threads = w.team;
            } else {
                share_out(w, w.rows, w.row_vectors, want, power, most);
                at.threads = int(round_up(w.team * w.teams, 32));
            }
            w.slice = w.cols;
        } else {
            w.slice = slice_of(w, p.type, slice_bytes);
            if (w.slice == 0 || w.rows > (int64_t(1) << 30)) return false;
            if (power) {  // a row's sum over its team
                w.slice = std::min({int64_t(32), power_of_2(ceil_div(slice_bytes, 16)), power_of_2(w.row_vectors)}) * V;
            }
            w.slices = ceil_div(w.cols, w.slice);
            row_vectors = int(w.slice / V);
            w.team = row_vectors;
            if (!apart) share_rows(w, w.rows, batch, 256);
            else if (!keep_apart(w, p, false, 1, false, batch, V, 256)) return false;
            at.threads = int(round_up(w.team * w.teams * std::max(1, w.samples), 32));
        }
        if (!apart) w.chunk_rows = int(w.rows);
        w.chunk_vectors = row_vectors;
        finish_walk(w, view.wide, V);
        const int batches = int(ceil_div(w.steps, batch));
        if (!spans(w)) return false;
        w.resident = batches - 1;
        at.sums_offset = backward && position && needs.parameters ? 0 : -1;
        at.blocks = w.units;
        const auto fits = [&] { return memory(at) <= limits.shared_bytes_per_block; };
        if (position) {
            // blocks walk over many slabs and keep their parameters, and sums per channel, from slab to slab
            at.blocks = std::min<int64_t>(w.units, int64_t(limits.processors) * std::max(1, limits.threads_per_processor / at.threads / 2));
            if (at.sums_offset >= 0 && !fits()) {
                w.resident = 0;
                if (!fits()) {  // sums per channel are too many: along columns a pass of their own, along rows one entry per slab
                    at.sums_offset = -1;
                    at.columns_pass = view.wide;
                    if (!view.wide) at.blocks = w.units;
                }
                w.resident = batches - 1;
            }
            while (!fits() && w.resident > 0) w.resident -= std::max(1, w.resident / 64);  // the rest is read again
        }
        if (!fits()) return false;
        if (position && (view.wide || at.sums_offset >= 0)) {  // more blocks than fit a processor at once would only leave more sums
            const int64_t fit = std::max(1, limits.shared_bytes_per_processor / (at.shared_bytes + 1024));
            at.blocks = std::min(at.blocks, limits.processors * fit);
        }
        if (at.blocks >= too_many) return false;
        plan = at;
        plan.read_x = 1 + double(batches - 1 - w.resident) / batches + (at.columns_pass ? 1 : 0);
        return true;
    };

    // ------------------------------------------------------------------------------------- single_pass, sets to several blocks
    // What blocks hold of their sets, in shared memory and in registers: one that shares its processor with another, one that has it alone
    const int processors = limits.processors - limits.spare_processors;
    const int most_threads = view.wide ? threads_of<true> : threads_of<false>;
    const int half_threads = most_threads / 2;
    const int64_t registers = int64_t(batch) * half_threads * vector_bytes;
    const auto half = [&](int64_t reductions) {
        return std::min(limits.shared_bytes_per_block, limits.shared_bytes_per_processor / 2 - 1024) - reductions + registers;
    };
    const auto whole = [&](int64_t reductions) { return limits.shared_bytes_per_block - 2 * reductions + 2 * registers; };
    const auto at_once = [&](const Plan& at) {  // blocks of a processor: by shared memory, threads, and registers
        return std::min({limits.shared_bytes_per_processor / (at.shared_bytes + 1024), limits.threads_per_processor / at.threads,
                         most_threads / at.threads});
    };
    // ``slice``: columns, of narrow sets. ``partly``: what does not fit may be read again
    const auto owned = [&](int64_t slice, Owner owner, int64_t chunks, int most, int least_at_once = 1, bool partly = false) -> bool {
        Plan at = plan;
        Walk& w = at.walk = view.walk;
        at.route = Route::single_pass;
        at.owner = owner;
        w.slice = slice;
        if (!view.wide) {
            w.slices = ceil_div(w.cols, slice);
            w.chunks_adjoin = true;
            if (w.rows > (int64_t(1) << 30)) return false;
        }
        if (apart) {
            if (!keep_apart(w, p, view.wide, chunks, owner == Owner::cluster, batch, V, most)) return false;
        } else if (view.wide) {
            cut(w, chunks, owner == Owner::cluster);
            share_out(w, w.chunk_rows, w.chunk_vectors, batch, backward && !w.one_channel, most);
        } else {
            w.chunk_rows = int(ceil_div(w.rows, chunks));
            w.chunks = owner == Owner::cluster ? chunks : ceil_div(w.rows, w.chunk_rows);
            w.chunk_vectors = w.team = int(slice / V);
            share_rows(w, w.chunk_rows, batch, most);
        }
        if (w.chunks < 2) return false;
        at.threads = int(round_up(w.team * w.teams * std::max(1, w.samples), 32));
        finish_walk(w, view.wide, V);
        if (!spans(w) || w.units >= too_many) return false;
        const int batches = int(ceil_div(w.steps, batch));
        w.resident = batches - 1;
        at.blocks = w.units;
        const auto fits = [&] {
            return memory(at) <= limits.shared_bytes_per_block && at_once(at) >= least_at_once &&
                   (owner == Owner::cluster || w.chunks <= int64_t(processors) * at_once(at));
        };
        if (owner == Owner::group) {
            // the part that does not fit is read again, by way of slots that are free at first
            const int least = landing_ahead;
            if (!fits()) {
                if (!partly) return false;
                int low = least, high = batches - 1;  // the most that fits
                while (low < high) {
                    w.resident = (low + high + 1) / 2;
                    if (fits()) low = w.resident;
                    else high = w.resident - 1;
                }
                w.resident = low;
                if (low >= batches - 1 || !fits() || 5 * low < batches) return false;  // below a fifth two launches will do (unmeasured)
            }
            const int64_t held = w.units / w.chunks;
            const int64_t most_groups = int64_t(processors) * at_once(at) / w.chunks;
            at.groups = int(ceil_div(held, ceil_div(held, std::min(held, most_groups))));
            at.blocks = at.groups * w.chunks;
            // room that is left takes the beginning of the next slab
            const int together = at_once(at);
            const auto room = [&] { return memory(at) <= limits.shared_bytes_per_block && at_once(at) >= together; };
            if (held > at.groups && w.resident == batches - 1) {
                const int64_t left =
                    std::min(limits.shared_bytes_per_block, limits.shared_bytes_per_processor / together - 1024) - at.shared_bytes;
                w.spare = int(std::min<int64_t>(w.resident, std::max<int64_t>(0, left) / (int64_t(batch) * at.threads * vector_bytes)));
                while (!room() && w.spare > 0) --w.spare;
                memory(at);
            }
        } else if (!fits()) {
            return false;
        }
        plan = at;
        plan.read_x = 1 + double(batches - 1 - w.resident) / batches;
        return true;
    };
    const bool forced = forced_route > int(Route::two_pass);
    // What owners hold at a time, a wide set or the sets of a slice: how many there are, of how many bytes, and to how many blocks they go
    struct Share {
        int64_t slice, held, bytes, reductions = 0, needed = 0, useful = 0, wanted = 0;
    };
    const auto share_of = [&](int64_t slice) {
        // bytes worth a block of its own, which exchanges 16 bytes, or (narrow) 48 for each of its columns (unmeasured)
        const int64_t least = view.wide ? 8192 : 32768;
        Share s = {slice, view.walk.outers, view.walk.rows * view.walk.row_vectors * int64_t(vector_bytes)};
        s.reductions = (int64_t(values) * 32 + 4 * 256) * accumulator;
        if (!view.wide) {
            const int64_t team = slice / V, rows = team < 32 && power_of_2(team) == team ? half_threads / 32 : half_threads / team;
            s.held *= ceil_div(view.walk.cols, slice);
            s.bytes = view.walk.rows * team * vector_bytes;
            s.reductions = (values * std::max<int64_t>(rows * slice, half_threads) + 6 * slice) * accumulator;
        }
        const int64_t room = half(s.reductions);  // none where the reductions of wide rows take it all: fits() decides then
        s.needed = room > 0 ? ceil_div(s.bytes, room) : 0;
        if (apart)
            s.needed = std::max(s.needed, ceil_div(p.N, view.wide ? half_threads / 2 : std::max<int64_t>(1, half_threads * V / slice)));
        s.useful = std::max<int64_t>(1, s.bytes / least);
        s.wanted = std::max(s.needed, std::min(ceil_div(2 * processors, s.held), s.useful));
        return s;
    };
    const auto by_clusters = [&](const Share& s, bool group) -> bool {
        const int64_t largest = limits.largest_cluster, of_two = power_of_2(std::max<int64_t>(2, s.wanted));
        if (largest < 2) return false;
        // a cluster is no burden to other kernels; but few sets in clusters would leave most of the device idle
        // (if they have more to read than what the meetings of a group cost: unmeasured)
        const bool idle = of_two > largest && 2 * largest * s.held < processors && s.bytes > largest * 65536;
        if (idle && group && !forced) return false;
        if (owned(s.slice, Owner::cluster, std::min(of_two, largest), half_threads)) return true;
        const int64_t room = whole(s.reductions);
        return (room <= 0 || ceil_div(s.bytes, room) <= largest) && owned(s.slice, Owner::cluster, largest, most_threads);
    };
    // ``least``: groups that must find room at once
    const auto by_groups = [&](const Share& s, int64_t least, bool partly) -> bool {
        const int64_t resident = 2 * int64_t(processors);
        if (s.needed > resident)
            return partly && (owned(s.slice, Owner::group, resident, half_threads, 1, true) ||
                              owned(s.slice, Owner::group, processors, half_threads, 1, true));
        // as many groups as find room, so that some load while others wait or store; then as many blocks to a group
        const int64_t groups = std::max<int64_t>(1, std::min(s.held, resident / std::max<int64_t>(2, s.needed)));
        if (groups < std::min(least, s.held)) return false;
        const int64_t equal = resident / ceil_div(s.held, ceil_div(s.held, groups));
        for (int64_t chunks = std::max<int64_t>({2, s.needed, std::min(equal, s.useful)}); chunks <= resident; chunks += 1 + chunks / 8)
            if (owned(s.slice, Owner::group, chunks, half_threads, 2)) return true;
        return partly && owned(s.slice, Owner::group, std::max<int64_t>(2, s.needed), half_threads, 1, true);
    };
    const auto several = [&](bool cluster, bool group) -> bool {
        if (view.wide) {
            const Share s = share_of(view.walk.cols);
            if (s.wanted < 2 && !forced) return false;
            return (cluster && by_clusters(s, group)) || (group && by_groups(s, 1, true));
        }
        // slices of whole lines of memory where they fit, of half lines where only they do, or where lines would leave a ragged slice
        const int64_t line = slice_of(view.walk, p.type, 128), half_line = slice_of(view.walk, p.type, 64);
        if (half_line == 0) return false;
        const bool even = line > 0 && (view.walk.cols % line == 0 || view.walk.cols >= 4 * line);
        const Share shares[] = {share_of(even ? line : half_line), share_of(half_line)};
        for (const Share& s : shares) {
            if (s.wanted < 2 && !forced) return false;
            if (cluster && by_clusters(s, group)) return true;
        }
        if (!group) return false;
        for (const Share& s : shares)
            if (by_groups(s, 2, false)) return true;
        return by_groups(shares[1], 1, true);
    };

    // ------------------------------------------------------------------------------------------------ a launch per pass
    const auto streaming = [&](Route route, bool settles = false) {
        Walk& w = plan.walk = view.walk;
        plan.route = route;
        plan.sums_offset = -1;
        plan.read_x = route == Route::two_pass ? 2 : 1;
        int row_vectors = w.row_vectors;
        const int64_t wanted_blocks = int64_t(limits.processors) * 4;  // unmeasured: 4 blocks of 256 threads fit a processor
        if (view.wide) {
            w.slice = w.cols;
            const int64_t set_vectors = w.rows * w.row_vectors;
            const int64_t wanted = std::max<int64_t>(1, std::min(ceil_div(wanted_blocks, w.outers), set_vectors / (256 * 4)));
            if (w.rows >= wanted) {
                w.chunk_rows = int(ceil_div(w.rows, wanted));
                w.chunk_vectors = w.row_vectors;
                while (!spans(w) && w.chunk_rows > 1) w.chunk_rows = (w.chunk_rows + 1) / 2;
            } else {
                w.chunk_rows = 1;
                w.chunk_vectors = int(ceil_div(w.row_vectors, ceil_div(wanted, w.rows)));
            }
            w.vector_chunks = int(ceil_div(w.row_vectors, w.chunk_vectors));
            w.chunks = ceil_div(w.rows, w.chunk_rows) * w.vector_chunks;
            row_vectors = w.chunk_vectors;
            const int64_t vectors = int64_t(w.chunk_rows) * row_vectors;
            if (vectors <= 64 && w.chunks == 1) {
                const int group = int(std::min<int64_t>(32, power_of_2(ceil_div(vectors, 2))));
                w.team = int(std::min<int64_t>(group, power_of_2(row_vectors)));
                w.teams = group / w.team;
                w.sets_per_block = 128 / group;
                plan.threads = group * w.sets_per_block;
            } else {
                share_out(w, w.chunk_rows, row_vectors, 2, backward && !w.one_channel, 256);
                plan.threads = int(round_up(w.team * w.teams, 32));
            }
        } else {
            w.slice = settles ? 0 : slice_of(w, p.type, 128);
            plan.settles = w.slice == 0 && route == Route::two_pass;
            if (w.slice == 0) {  // any slice will do
                w.slice = std::min<int64_t>(8 * V, ceil_div(w.cols, V) * V);
            }
            w.slices = ceil_div(w.cols, w.slice);
            row_vectors = int(w.slice / V);
            w.team = row_vectors;
            share_rows(w, w.rows, 1, 256);
            plan.threads = int(round_up(w.team * w.teams, 32));
            const int64_t units = w.outers * w.slices;
            const int64_t wanted = std::max<int64_t>(1, std::min(ceil_div(wanted_blocks, units), w.rows / (int64_t(w.teams) * 4)));
            w.chunk_rows = int(std::min<int64_t>(ceil_div(w.rows, wanted), int64_t(1) << 30));
            w.chunk_vectors = row_vectors;
            while (!spans(w) && w.chunk_rows > 1) w.chunk_rows = (w.chunk_rows + 1) / 2;
            w.chunks = ceil_div(w.rows, w.chunk_rows);
            // every block would read the partials of all chunks; where that is much beside its own rows, a launch merges them once
            const int64_t partial_bytes = w.chunks * values * accumulator, row_bytes = int64_t(w.chunk_rows) * size_of(p.type);
            if (route == Route::two_pass && step != Step::moments && step != Step::grad_moments && 8 * partial_bytes > row_bytes)
                plan.settles = plan.settles || w.chunks > 1;
        }
        // blocks that each finish their sets could not agree on who reads the running statistics and who moves them on
        if (step == Step::norm_act && route == Route::two_pass && p.rule == Rule::renorm) plan.settles = true;
        finish_walk(w, view.wide, V);
        w.resident = 0;
        plan.blocks = w.units;
        return memory(plan) <= limits.shared_bytes_per_block;
    };
    const auto stream = [&](Route route) {
        if (!streaming(route)) streaming(route, true);
    };

    if (step == Step::apply || step == Step::grad_apply || (step == Step::norm_act && !p.batch_statistics && !apart) ||
        (step == Step::norm_act_backward && !sums_needed && !position)) {
        stream(Route::apply_only);
    } else if (step == Step::moments || step == Step::grad_moments) {
        stream(Route::two_pass);
        plan.read_x = 1;
    } else {
        const bool counts_late = step == Step::norm_act && p.cumulative && p.scope == Scope::channel;  // needs an arrival word
        const bool allowed = forced_route != int(Route::two_pass) && (pool || !counts_late);
        if (position) {
            if (!single(128)) single(64);
        } else {
            bool found = false;
            if (allowed) found = several(forced_route != by_group, pool && forced_route != by_cluster);
            if (allowed && !found) {
                found = single(128) || single(64);
                if (found && forced_route < 0) {
                    // a few large sets would leave most of the device idle (unmeasured)
                    const double set_bytes = double(p.elements()) * size_of(p.type) / plan.walk.units;
                    found = 2 * plan.blocks >= limits.processors || set_bytes <= 32768;
                }
            }
            if (!found) stream(Route::two_pass);
        }
    }

    if (plan.columns_pass) {  // the tensor as (N*S) x C
        Walk& w = plan.columns_walk = view.walk;
        w.outers = 1;
        w.high_stride = 0;
        w.rows = p.N * p.S;
        w.row_stride = p.C;
        w.slice = std::min<int64_t>(8 * V, ceil_div(p.C, V) * V);
        w.slices = ceil_div(w.cols, w.slice);
        w.width = 1;
        w.sets_per_outer = p.C;
        w.team = int(w.slice / V);
        w.teams = int(std::max<int64_t>(1, std::min<int64_t>(256 / w.team, w.rows)));
        const int64_t wanted =
            std::max<int64_t>(1, std::min<int64_t>(ceil_div(limits.processors * 4, w.slices), w.rows / (int64_t(w.teams) * 4)));
        w.chunk_rows = int(ceil_div(w.rows, wanted));
        w.vector_chunks = 1;
        w.chunk_vectors = int(w.slice / V);
        while (!spans(w) && w.chunk_rows > 1) w.chunk_rows = (w.chunk_rows + 1) / 2;
        w.chunks = ceil_div(w.rows, w.chunk_rows);
        w.sets_per_block = 1;
        finish_walk(w, false, V);
        plan.columns_threads = int(round_up(w.team * w.teams, 32));
    }
    return plan;
}

}  // namespace normfused
