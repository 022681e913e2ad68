// Barriers in shared memory and pipelines of asynchronous copies, as libcu++ and cooperative groups have them.

#include <cooperative_groups.h>
#include <cooperative_groups/memcpy_async.h>
#include <cuda/barrier>
#include <cuda/pipeline>

#pragma nv_diag_suppress static_var_with_dynamic_init

namespace cg = cooperative_groups;
using Barrier = cuda::barrier<cuda::thread_scope_block>;

// 128 threads each.
template <bool settle, bool wait> __device__ void meet(const int *in, int *out) {
    __shared__ Barrier barrier;
    __shared__ int s[128];
    const int t = threadIdx.x;
    if (t == 0) {
        init(&barrier, 128);
    }
    if (settle) {
        __syncthreads(); // the barrier is initialised
    }
    for (int round = 0; round < 3; round++) {
        s[t] = in[t] + round;
        Barrier::arrival_token arrived = barrier.arrive();
        if (wait) {
            barrier.wait(std::move(arrived));
        }
        out[round * 128 + t] = s[127 - t];
        barrier.arrive_and_wait();
    }
}
extern "C" __global__ void met(const int *in, int *out) { meet<true, true>(in, out); }
extern "C" __global__ void not_waited(const int *in, int *out) { meet<true, false>(in, out); }
extern "C" __global__ void not_settled(const int *in, int *out) { meet<false, true>(in, out); }

extern "C" __global__ void copied(const int *in, int *out) {
    __shared__ Barrier barrier;
    __shared__ alignas(16) int s[128];
    auto block = cg::this_thread_block();
    if (block.thread_rank() == 0) {
        init(&barrier, block.size());
    }
    block.sync();
    cuda::memcpy_async(block, s, in, cuda::aligned_size_t<16>(sizeof(s)), barrier);
    barrier.arrive_and_wait();
    out[threadIdx.x] = s[127 - threadIdx.x];
}

extern "C" __global__ void copied_by_group(const int *in, int *out) {
    __shared__ alignas(16) int s[128];
    auto block = cg::this_thread_block();
    cg::memcpy_async(block, s, in, cuda::aligned_size_t<16>(sizeof(s)));
    cg::wait(block);
    out[threadIdx.x] = s[127 - threadIdx.x];
}

// Tiles of 128 in two stages: the sum of all, each times its number.
extern "C" __global__ void pipeline(const int *in, int *out, int tiles) {
    __shared__ alignas(16) int s[2][128];
    const int t = threadIdx.x;
    auto pipe = cuda::make_pipeline();
    for (int tile = 0; tile < 2; tile++) {
        pipe.producer_acquire();
        if (tile < tiles) {
            cuda::memcpy_async(&s[tile][t], in + tile * 128 + t, sizeof(int), pipe);
        }
        pipe.producer_commit();
    }
    int sum = 0;
    for (int tile = 0; tile < tiles; tile++) {
        cuda::pipeline_consumer_wait_prior<1>(pipe);
        __syncthreads(); // all threads' copies of the tile have arrived
        sum += s[tile & 1][127 - t] * (tile + 1);
        pipe.consumer_release();
        __syncthreads(); // all have read the tile
        pipe.producer_acquire();
        if (tile + 2 < tiles) {
            cuda::memcpy_async(&s[tile & 1][t], in + (tile + 2) * 128 + t, sizeof(int), pipe);
        }
        pipe.producer_commit();
    }
    out[t] = sum;
}
