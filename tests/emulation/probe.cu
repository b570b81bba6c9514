// Every helper of device.cuh in few kernels, compiled by nvcc only.
#include "../../csrc/kernels/device.cuh"

using namespace normfused;

struct Arguments {
    Global<const float> x;
    Global<float> y;
    Global<const __half> half_in;
    Global<__half> half_out;
    Global<const __nv_bfloat16> brain_in;
    Global<const double> double_in;
    Global<double> double_out;
    Global<int8_t> bytes;
    Global<uint8_t> bits;
    Global<int64_t> counter;
    Global<uint32_t> words;
};

// Nothing but two accesses of 16 bytes
NF_KERNEL(256) copy_floats(NF_GRID_CONSTANT Arguments a) {
    const int64_t i = 4 * int64_t(block_index() * block_threads() + thread_index());
    a.y.store(i, a.x.load<4>(i));
}
NF_KERNEL(256) copy_halves(NF_GRID_CONSTANT Arguments a) {
    const int64_t i = 8 * int64_t(block_index() * block_threads() + thread_index());
    a.half_out.store(i, a.half_in.load<8>(i));
}
NF_KERNEL(256) copy_coherent(NF_GRID_CONSTANT Arguments a) {
    const int64_t i = 4 * int64_t(block_index() * block_threads() + thread_index());
    a.y.store(i, a.y.advance(1024).load_coherent<4>(i));
}
NF_KERNEL(256) copy_first(NF_GRID_CONSTANT Arguments a) {
    const int64_t i = 4 * int64_t(block_index() * block_threads() + thread_index());
    a.y.store(i, a.x.load<4>(i, Cache::evict_first), Cache::evict_first);
}
NF_KERNEL(256) copy_last(NF_GRID_CONSTANT Arguments a) {
    const int64_t i = 4 * int64_t(block_index() * block_threads() + thread_index());
    a.y.store(i, a.x.load<4>(i, Cache::evict_last), Cache::evict_last);
    a.y.store(i + 4096, a.y.load_coherent<4>(i + 8192, Cache::evict_last));
}

NF_KERNEL(256) maths(NF_GRID_CONSTANT Arguments a) {
    const unsigned i = block_index() * block_threads() + thread_index();
    const float v = a.x.load(i), w = fma_(v, v, 1.0f);
    a.y.store(i, exp_(v) + expm1_(v) + log1p_(v) + erf_(v) + tanh_(v) + sqrt_(w) + abs_(v) + min_(v, w) + max_(v, w) + reciprocal_fast_(w) + exp_of_minus_(v) + max_nan_(v, w) +
                     reciprocal_(w));
    const double d = a.double_in.load(i), e = fma_(d, d, 1.0);
    a.double_out.store(i, exp_(d) + expm1_(d) + log1p_(d) + erf_(d) + tanh_(d) + sqrt_(e) + abs_(d) + min_(d, e) + max_(d, e) +
                              reciprocal_fast_(e) + exp_of_minus_(d) + max_nan_(d, e) + reciprocal_(e));
    a.double_out.store<2>(2 * i, a.double_in.load<2>(2 * i));
    a.half_out.store(i, convert<__half>(convert<float>(a.half_in.load(i)) + convert<double>(a.brain_in.load(i)) +
                                        convert<float>(convert<__nv_bfloat16>(v))));
    Pack<uint8_t, 4> four;
    NF_UNROLL for (int k = 0; k < 4; ++k) four[k] = static_cast<uint8_t>(k + i);
    a.bits.store(4 * i, four);
    a.bytes.store(i, static_cast<int8_t>(v));
    if (i == 0) a.counter.store(0, a.counter.load_coherent(0) + 1);
    const Pack<float, 8> wide = a.x.load<8>(8 * i);
    a.y.store(8 * i, wide);
}

NF_KERNEL(256) together(NF_GRID_CONSTANT Arguments a) {
    const unsigned t = thread_index();
    auto s = shared_at<float>(0, 1024);
    copy_async<4>(s, 4 * t, a.x, 4 * t);
    copy_async_commit();
    copy_async_wait<1>();
    copy_async_wait<0>();
    sync_block();
    float v = s.part(16, 256).get(t) + float(s.count());
    v = shuffle_xor(v, 16) + shuffle_down(v, 8) + shuffle(v, 3) + float(shuffle_xor(double(v), 2)) + float(shuffle(int32_t(t), 0)) +
        float(shuffle_down(uint32_t(t), 1));
    sync_warp();
    s.set(t, v);
    s.store(4 * t, s.load<4>(4 * (255 - t)));
    a.y.store(t, v);
    sync_grid(a.words);
    if (any_in_block(v > 1) && last_to_arrive(a.words.advance(1), grid_blocks())) a.y.store(t, a.y.load_coherent(255 - t));
    if (a.counter && lane_index() == 0 && warp_index() == 1) a.counter.store(1, 1);
}

NF_KERNEL(256) in_clusters(NF_GRID_CONSTANT Arguments a) {
    auto s = shared_at<float>(128, 1024);
    auto barrier = bulk_barrier_at(0), other = bulk_barrier_at(8);
    if (thread_index() == 0) {
        barrier.init(1);
        other.init(1);
    }
    sync_block();
    if (thread_index() == 0) {
        barrier.expect_bytes(2048);
        copy_bulk(s, 0, a.x, 0, 512, barrier);
        other.expect_bytes(2048);
        copy_bulk(s, 512, a.x, 512, 512, other);
    }
    barrier.wait(0);
    other.wait(0);
    sync_cluster();
    const float v = s.on_block((cluster_rank() + 1) % cluster_blocks()).get(thread_index());
    sync_cluster();
    s.set(thread_index(), v);
    fence_bulk();
    sync_block();
    if (thread_index() == 0) {
        copy_bulk(a.y, 0, s, 0, 1024);
        copy_bulk_commit();
        copy_bulk_wait<0>();
    }
}

int run(const Arguments& a, void* stream) {
    declare("x", nullptr, 0, false);
    forget_all();
    int status = launch(copy_floats, {"copy_floats", 4, 256, 0, stream}, a);
    status |= launch(copy_halves, {"copy_halves", 4, 256, 0, stream}, a) | launch(copy_coherent, {"copy_coherent", 4, 256, 0, stream}, a);
    status |= launch(copy_first, {"copy_first", 4, 256, 0, stream}, a) | launch(copy_last, {"copy_last", 4, 256, 0, stream}, a);
    status |= launch(maths, {"maths", 4, 256, 0, stream}, a);
    status |= launch(together, {"together", 4, 256, 4096, stream, true}, a);
    status |= launch(in_clusters, {"in_clusters", 4, 256, 100000, stream, false, 2}, a);
    return *emulation_message() ? -1 : status;
}
