// Block and warp primitives of libraries: CUB's scans, reductions, sorts and histograms; scans and partitions of
// cooperative groups.

#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>
#include <cub/block/block_histogram.cuh>
#include <cub/block/block_load.cuh>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/block/block_store.cuh>
#include <cub/warp/warp_reduce.cuh>
#include <cub/warp/warp_scan.cuh>

namespace cg = cooperative_groups;

// 128 threads with 4 elements each.
extern "C" __global__ void exclusive_scan(const int *in, int *out) {
    using Load = cub::BlockLoad<int, 128, 4, cub::BLOCK_LOAD_WARP_TRANSPOSE>;
    using Scan = cub::BlockScan<int, 128>;
    using Store = cub::BlockStore<int, 128, 4, cub::BLOCK_STORE_TRANSPOSE>;
    __shared__ union {
        Load::TempStorage load;
        Scan::TempStorage scan;
        Store::TempStorage store;
    } shared;
    int v[4];
    Load(shared.load).Load(in, v);
    __syncthreads(); // the loads' exchange is over
    Scan(shared.scan).ExclusiveSum(v, v);
    __syncthreads(); // the scan's exchange is over
    Store(shared.store).Store(out, v);
}

extern "C" __global__ void sum_and_maximum(const float *in, float *out) {
    using Reduce = cub::BlockReduce<float, 128>;
    __shared__ Reduce::TempStorage shared;
    const float sum = Reduce(shared).Sum(in[threadIdx.x]);
    __syncthreads(); // the sum's exchange is over
    const float most = Reduce(shared).Reduce(in[threadIdx.x], cuda::maximum<>{});
    if (threadIdx.x == 0) {
        out[0] = sum;
        out[1] = most;
    }
}

extern "C" __global__ void sort(const unsigned *in, unsigned *out) {
    using Sort = cub::BlockRadixSort<unsigned, 128, 4>;
    __shared__ Sort::TempStorage shared;
    unsigned v[4];
    for (int i = 0; i < 4; i++) {
        v[i] = in[threadIdx.x * 4 + i];
    }
    Sort(shared).Sort(v);
    for (int i = 0; i < 4; i++) {
        out[threadIdx.x * 4 + i] = v[i];
    }
}

extern "C" __global__ void counts(const unsigned char *in, unsigned *out) {
    using Histogram = cub::BlockHistogram<unsigned char, 128, 4, 64, cub::BLOCK_HISTO_ATOMIC>;
    __shared__ Histogram::TempStorage shared;
    __shared__ unsigned bins[64];
    unsigned char v[4];
    for (int i = 0; i < 4; i++) {
        v[i] = in[threadIdx.x * 4 + i];
    }
    Histogram(shared).Histogram(v, bins);
    __syncthreads(); // all have counted
    if (threadIdx.x < 64) {
        out[threadIdx.x] = bins[threadIdx.x];
    }
}

// Per warp: CUB's and cooperative groups' inclusive scans, and sums over the lanes that are alike.
extern "C" __global__ void warps(const int *in, int *out) {
    using Reduce = cub::WarpReduce<int>;
    using Scan = cub::WarpScan<int>;
    __shared__ Reduce::TempStorage reduce[4];
    __shared__ Scan::TempStorage scan[4];
    const int v = in[threadIdx.x], warp = threadIdx.x / 32;
    auto tile = cg::tiled_partition<32>(cg::this_thread_block());
    int *own = out + threadIdx.x * 6;
    const int sum = Reduce(reduce[warp]).Sum(v);
    own[0] = threadIdx.x % 32 == 0 ? sum : 0;
    Scan(scan[warp]).InclusiveSum(v, own[1]);
    own[2] = cg::inclusive_scan(tile, v, cg::plus<int>());
    own[3] = cg::exclusive_scan(tile, v, cg::plus<int>());
    own[4] = cg::reduce(cg::binary_partition(tile, v & 1), v, cg::plus<int>());
    own[5] = cg::labeled_partition(tile, v % 5).size();
}

// The lanes that keep a value take places in the output together.
extern "C" __global__ void filter(const int *in, int *count, int *out) {
    const int v = in[blockIdx.x * blockDim.x + threadIdx.x];
    if (v % 3 == 0) {
        cg::coalesced_group group = cg::coalesced_threads();
        int base = 0;
        if (group.thread_rank() == 0) {
            base = atomicAdd(count, group.size());
        }
        base = group.shfl(base, 0);
        out[base + group.thread_rank()] = v;
    }
}
