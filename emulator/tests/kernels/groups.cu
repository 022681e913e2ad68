// Groups wider than a warp, and grids whose blocks meet.

#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>

namespace cg = cooperative_groups;

// 256 threads: in each the sum of its 64.
extern "C" __global__ void wide_tiles(const int *in, int *out) {
    __shared__ cg::block_tile_memory<256> scratch;
    auto tile = cg::tiled_partition<64>(cg::this_thread_block(scratch));
    out[threadIdx.x] = cg::reduce(tile, in[threadIdx.x], cg::plus<int>());
}

enum Bug { NONE, EARLY, LATE };

// Each block writes its number of the round and adds up its neighbour's.
template <Bug bug> __device__ void rounds(int *x, int *sums) {
    auto grid = cg::this_grid();
    const int b = blockIdx.x, next = (b + 1) % gridDim.x;
    int sum = 0;
    for (int round = 0; round < 5; round++) {
        if (threadIdx.x == 0) {
            x[b] = 100 * round + b;
        }
        if (bug != EARLY) {
            grid.sync(); // all have written
        }
        sum += x[next];
        if (bug != LATE) {
            grid.sync(); // all have read
        }
    }
    sums[b * blockDim.x + threadIdx.x] = sum;
}
extern "C" __global__ void rounds_meet(int *x, int *sums) { rounds<NONE>(x, sums); }
extern "C" __global__ void rounds_early(int *x, int *sums) { rounds<EARLY>(x, sums); }
extern "C" __global__ void rounds_late(int *x, int *sums) { rounds<LATE>(x, sums); }

// A counter that one block sets and all count up.
template <bool meet> __device__ void counted(int *x, int *sums) {
    auto grid = cg::this_grid();
    if (grid.thread_rank() == 0) {
        *x = 7;
    }
    if (meet) {
        grid.sync(); // the counter is set
    }
    if (threadIdx.x == 0) {
        atomicAdd(x, 1);
    }
    grid.sync(); // all have counted
    sums[blockIdx.x * blockDim.x + threadIdx.x] = *x;
}
extern "C" __global__ void counted_after(int *x, int *sums) { counted<true>(x, sums); }
extern "C" __global__ void counted_before(int *x, int *sums) { counted<false>(x, sums); }

// A value that all blocks read and the first, which takes its time, then changes.
template <bool meet> __device__ void changed(int *x, int *sums) {
    auto grid = cg::this_grid();
    const bool first = blockIdx.x == 0;
    if (grid.thread_rank() == 0) {
        *x = 7;
    }
    grid.sync(); // the value is there
    unsigned v = first ? threadIdx.x : *x;
#pragma unroll 1
    for (unsigned i = 0; first && i < 20000; i++) {
        v = v & 1 ? 3 * v + 1 : v / 2 + i;
    }
    if (meet) {
        grid.sync(); // all have read
    }
    if (first && threadIdx.x == 0) {
        *x = v | 8;
    }
    sums[blockIdx.x * blockDim.x + threadIdx.x] = v;
}
extern "C" __global__ void changed_after(int *x, int *sums) { changed<true>(x, sums); }
extern "C" __global__ void changed_before(int *x, int *sums) { changed<false>(x, sums); }

__device__ int scan_warp(int v) {
    for (int d = 1; d < 32; d *= 2) {
        const int below = __shfl_up_sync(~0u, v, d);
        if (threadIdx.x % 32 >= d) {
            v += below;
        }
    }
    return v;
}
// Inclusive scan over a block. The first warp scans 32 warp sums, however many warps there are: the unwritten ones
// reach only lanes whose result nobody uses, or with `down` all lanes.
template <bool down> __device__ void scan_block(const int *in, int *out) {
    __shared__ int sums[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int v = scan_warp(in[threadIdx.x]);
    if (lane == 31) {
        sums[warp] = v;
    }
    __syncthreads(); // the sums of the warps are there
    if (warp == 0) {
        const int s = scan_warp(sums[lane]);
        sums[lane] = down ? __shfl_down_sync(~0u, s, 16) : s;
    }
    __syncthreads(); // they are scanned
    out[threadIdx.x] = v + (warp > 0 ? sums[warp - 1] : 0);
}
extern "C" __global__ void scan_up(const int *in, int *out) { scan_block<false>(in, out); }
extern "C" __global__ void scan_down(const int *in, int *out) { scan_block<true>(in, out); }
