// Plans and walks without memory or launches: every vector that a thread would meet, held against numbers computed from its address.
#include <cstdio>

#include "../../csrc/kernels/plan.h"
#include "../../csrc/kernels/slab.cuh"

namespace normfused {
namespace simt {
NF_HIDDEN Thread* current;
NF_HIDDEN Grid grid;
NF_HIDDEN bool watching;
}  // namespace simt

namespace {

simt::Thread thread;

struct Question {
    int64_t scope, layout, type, N, C, S, groups, rule, batch_statistics, cumulative, residual_mode, act, step, needs, route, pool;
    int64_t processors, shared_bytes_per_block, shared_bytes_per_processor, threads_per_processor, largest_cluster, spare_processors;
    int64_t columns;  // the walk of the pass for parameters of position sets instead
};

Problem problem_of(const Question& q) {
    Problem p;
    p.scope = Scope(q.scope);
    p.layout = Layout(q.layout);
    p.type = Type(q.type);
    p.N = q.N, p.C = q.C, p.S = q.S, p.groups = q.groups;
    p.rule = Rule(q.rule), p.batch_statistics = q.batch_statistics, p.cumulative = q.cumulative;
    p.residual_mode = ResidualMode(q.residual_mode);
    p.act = Act(q.act);
    return p;
}

Plan plan_of(const Question& q) {
    const Needs needs = {(q.needs & 1) != 0, (q.needs & 2) != 0, (q.needs & 4) != 0};
    const Limits limits = {int(q.processors), int(q.shared_bytes_per_block), int(q.shared_bytes_per_processor), int(q.threads_per_processor),
                           int(q.largest_cluster), int(q.spare_processors)};
    return choose_plan(problem_of(q), Step(q.step), needs, limits, q.pool, int(q.route));
}

char answer[512];
template <class... Values> const char* say(const char* format, Values... values) {
    std::snprintf(answer, sizeof answer, format, values...);
    return answer;
}

struct Place {
    int64_t n, c, s;
};
Place place_of(const Problem& p, int64_t at) {
    if (p.layout == Layout::nhwc || p.S == 1) return {at / (p.C * p.S), at % p.C, at / p.C % p.S};
    return {at / (p.C * p.S), at / p.S % p.C, at % p.S};
}
int64_t set_of(const Problem& p, const Place& at) {
    if (p.scope == Scope::channel) return at.c;
    return p.scope == Scope::position ? at.n * p.S + at.s : at.n * p.groups + at.c / (p.C / p.groups);
}

// What a vector says of itself: inside the tensor, its set, its channel, its alignment
template <class S> const char* wrong(const Problem& p, const Walk& w, bool wide, bool rows, bool columns, const S& slab, const Spot<false>& s) {
    for (int j = s.first; j < s.last; ++j) {
        const int64_t at = slab.corner + s.at + j;
        if (at < 0 || at >= p.elements()) return say("element %lld is outside", (long long)at);
        const Place place = place_of(p, at);
        const int64_t channel = rows ? slab.row_channel(w, s.row) : slab.column0 + s.column + j;
        // matrices of rows of one channel count channels from the sample on
        if (channel != place.c) return say("element %lld: channel %lld, not %lld", (long long)at, (long long)channel, (long long)place.c);
        if (!columns && slab.set(w, j) != set_of(p, place))
            return say("element %lld: set %lld, not %lld", (long long)at, (long long)slab.set(w, j), (long long)set_of(p, place));
        if (!wide && slab.column(j) != s.column + j) return say("element %lld: column %d, not %d", (long long)at, s.column + j, slab.column(j));
    }
    if (slab.template readable<false>(s) && (slab.corner + s.at) % S::V != 0) return say("a whole vector at %lld", (long long)(slab.corner + s.at));
    return nullptr;
}

template <class T, bool kWide> const char* cover(const Problem& p, const Plan& plan, bool columns, uint8_t* elements, uint8_t* mask) {
    const Walk& w = columns ? plan.columns_walk : plan.walk;
    const int threads = columns ? plan.columns_threads : plan.threads;
    simt::current = &thread;
    for (int64_t unit = 0; unit < w.units; ++unit)
        for (thread.index = 0; thread.index < unsigned(threads); ++thread.index) {
            const Slab<T, kWide> slab(w, unit);
            int64_t sample = -1;  // that a thread keeps to, where samples have statistics of their own
            auto cursor = slab.start(), back = slab.after(w.steps);
            for (int step = 0; step < w.steps; ++step) slab.retreat(back);
            if (cursor.row != back.row || cursor.vector != back.vector) return say("unit %lld: the way back ends elsewhere", (long long)unit);
            for (int step = 0; step < w.steps; ++step) {
                const auto there = slab.after(step);
                if (cursor.row != there.row || cursor.vector != there.vector) return say("unit %lld: step %d", (long long)unit, step);
                const Spot<false> s = slab.spot(cursor);
                const Spot<true> regular = slab.template spot<true>(cursor);
                if (slab.regular && (regular.empty() != s.empty() ||
                                     (!s.empty() && (regular.at != s.at || regular.row != s.row || regular.column != s.column || s.first != 0 ||
                                                     s.lanes() != (Slab<T, kWide>::V) || !s.aligned))))
                    return say("unit %lld, thread %u: step %d is not regular", (long long)unit, thread.index, step);
                if (const char* why = wrong(p, w, kWide, columns ? false : plan.rows, columns, slab, s)) return why;
                for (int j = s.first; j < s.last; ++j) {
                    const int64_t at = slab.corner + s.at + j, n = place_of(p, at).n;
                    if (p.rule == Rule::batch_instance && plan.route == Route::single_pass && sample >= 0 && n != sample)
                        return say("unit %lld, thread %u: of samples %lld and %lld", (long long)unit, thread.index, (long long)sample, (long long)n);
                    sample = n;
                    ++elements[at];
                }
                if (!s.empty()) ++mask[slab.mask_at(w, cursor)];
                slab.advance(cursor);
            }
        }
    return "";
}

template <class T, bool kWide> const char* look(const Problem& p, const Plan& plan, bool columns, int64_t unit, int64_t index, int64_t step, int64_t* out) {
    const Walk& w = columns ? plan.columns_walk : plan.walk;
    thread.index = unsigned(index);
    simt::current = &thread;
    const Slab<T, kWide> slab(w, unit);
    const auto cursor = slab.after(int(step));
    const Spot<false> s = slab.spot(cursor);
    const int64_t seen[] = {slab.corner + s.at, s.first, s.last, slab.mask_at(w, cursor)};
    for (int i = 0; i < 4; ++i) out[i] = seen[i];
    const char* why = wrong(p, w, kWide, columns ? false : plan.rows, columns, slab, s);
    return why ? why : "";
}

}  // namespace
}  // namespace normfused

using namespace normfused;

#define NF_BY_TYPE(function, ...)                                                                          \
    const bool wide = q->columns ? false : plan.wide;                                                      \
    switch (p.type) {                                                                                      \
        case Type::float64: return wide ? function<double, true>(__VA_ARGS__) : function<double, false>(__VA_ARGS__); \
        case Type::float32: return wide ? function<float, true>(__VA_ARGS__) : function<float, false>(__VA_ARGS__);   \
        default: return wide ? function<__half, true>(__VA_ARGS__) : function<__half, false>(__VA_ARGS__);            \
    }

extern "C" {

// Counts, for every element and every byte of the mask, how often it is met; what is wrong, or nothing
const char* nf_cover(const Question* q, uint8_t* elements, uint8_t* mask) {
    const Problem p = problem_of(*q);
    const Plan plan = plan_of(*q);
    NF_BY_TYPE(cover, p, plan, q->columns != 0, elements, mask)
}

// out: address, first and last lane of the vector that a thread meets, and its byte of the mask
const char* nf_look(const Question* q, int64_t unit, int64_t thread, int64_t step, int64_t* out) {
    const Problem p = problem_of(*q);
    const Plan plan = plan_of(*q);
    NF_BY_TYPE(look, p, plan, q->columns != 0, unit, thread, step, out)
}

// Everything that a plan says, as JSON
const char* nf_plan(const Question* q) {
    static char text[4096];
    const Plan plan = plan_of(*q);
    const Walk& w = q->columns ? plan.columns_walk : plan.walk;
    std::snprintf(text, sizeof text,
                  "{\"route\": %d, \"wide\": %d, \"rows\": %d, \"threads\": %d, \"blocks\": %lld, \"shared_bytes\": %d, \"slab_bytes\": %d, \"columns_pass\": %d, "
                  "\"settles\": %d, \"outers\": %lld, \"period\": %lld, \"high_stride\": %lld, \"low_stride\": %lld, \"walk_rows\": %lld, \"row_stride\": %lld, "
                  "\"cols\": %lld, \"row_vectors\": %d, \"slice\": %lld, \"slices\": %lld, \"chunks\": %lld, \"chunk_rows\": %d, \"chunk_vectors\": %d, "
                  "\"vector_chunks\": %d, \"per_row\": %d, \"steps\": %d, \"units\": %lld, \"team\": %d, \"teams\": %d, \"sets_per_block\": %d, "
                  "\"resident\": %d, \"phase_mask\": %d, \"batch\": %d, \"owner\": %d, \"groups\": %d, \"spare\": %d, \"read_x\": %.9g, \"chunks_adjoin\": %d, \"mask_shift\": %d, \"folds\": %d, \"regular\": %d, \"samples\": %d, \"sample_rows\": %lld}",
                  int(plan.route), q->columns ? 0 : plan.wide, q->columns ? 0 : plan.rows, q->columns ? plan.columns_threads : plan.threads,
                  (long long)(q->columns ? w.units : plan.blocks), plan.shared_bytes, plan.scratch_offset, plan.columns_pass, plan.settles, (long long)w.outers,
                  (long long)w.period, (long long)w.high_stride, (long long)w.low_stride, (long long)w.rows, (long long)w.row_stride, (long long)w.cols,
                  w.row_vectors, (long long)w.slice, (long long)w.slices, (long long)w.chunks, w.chunk_rows, w.chunk_vectors, w.vector_chunks, w.per_row,
                  w.steps, (long long)w.units, w.team, w.teams, w.sets_per_block, w.resident, w.phase_mask, plan.batch,
                  int(plan.owner), plan.groups, w.spare, plan.read_x, w.chunks_adjoin, w.mask_shift, w.folds, w.regular, w.samples, (long long)w.sample_rows);
    return text;
}
}
