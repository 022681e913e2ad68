// Votes, matches, reductions, shuffles of every kind, population counts, cooperative groups.

#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
namespace cg = cooperative_groups;

extern "C" __global__ void votes(const int *in, unsigned *out) {
    const int v = in[threadIdx.x];
    const unsigned lane = threadIdx.x % 32;
    unsigned *own = out + threadIdx.x * 10;
    own[0] = __ballot_sync(0xffffffff, v & 1);
    own[1] = __any_sync(0xffffffff, v > 5) + 2 * __all_sync(0xffffffff, v >= 0);
    own[2] = __match_any_sync(0xffffffff, v % 3);
    int all_alike;
    own[3] = __match_all_sync(0xffffffff, v / 100, &all_alike) + all_alike;
    own[4] = __reduce_add_sync(0xffffffff, v);
    own[5] = __reduce_max_sync(0xffffffff, v) * 1000 + __reduce_min_sync(0xffffffff, v);
    own[6] = __reduce_xor_sync(0xffffffff, v);
    own[7] = __shfl_up_sync(0xffffffff, v, 3) + 1000 * __shfl_sync(0xffffffff, v, (lane + 5) % 32, 8);
    own[8] = __popc(v * 77) + 100 * __clz(v + 1) + 10000 * __ffs(v);
    own[9] = __brev(v) ^ __funnelshift_l(v, v * 3, 5) ^ __byte_perm(v, v * 7, 0x3715);
    if (v % 2 == 0) {
        own[9] += __popc(__activemask()); // lanes that took this branch
    }
}

extern "C" __global__ void groups(const int *in, int *out) {
    cg::thread_block block = cg::this_thread_block();
    auto tile = cg::tiled_partition<8>(block);
    int v = in[block.thread_rank()];
    for (int offset = tile.size() / 2; offset > 0; offset /= 2) {
        v += tile.shfl_down(v, offset);
    }
    if (tile.thread_rank() == 0) {
        out[block.thread_rank() / 8] = v;
    }
    auto warp = cg::tiled_partition<32>(block);
    const int sum = cg::reduce(warp, in[block.thread_rank()], cg::plus<int>());
    __shared__ int first[2];
    if (warp.thread_rank() == 0) {
        first[warp.meta_group_rank()] = sum;
    }
    block.sync();
    if (block.thread_rank() == 0) {
        out[8] = first[0] + first[1];
    }
    if (in[block.thread_rank()] % 2) {
        cg::coalesced_group odd = cg::coalesced_threads();
        if (odd.thread_rank() == 0) {
            out[9 + warp.meta_group_rank()] = odd.size();
        }
    }
}

// Every block waits for every other: needs a cooperative launch.
extern "C" __global__ void grid_sync(int *counts, int *out) {
    cg::grid_group grid = cg::this_grid();
    if (threadIdx.x == 0) {
        atomicAdd(counts, 1);
    }
    grid.sync();
    if (threadIdx.x == 0) {
        out[blockIdx.x] = *(volatile int *)counts;
    }
}
