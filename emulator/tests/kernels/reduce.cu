// sums[block] = sum of the block's share of x[0..n], by shuffles inside warps and shared memory between them.
//
// Blocks of 256 threads stride over x. The kernels after the first have one bug each.

enum Bug { NONE, DROPPED_BARRIER, OFF_BY_ONE, UNINITIALISED, INACTIVE_LANE, GLOBAL_RACE };

__device__ float sum_of_warp(float v) {
    for (int offset = 16; offset > 0; offset /= 2) {
        v += __shfl_xor_sync(0xffffffffu, v, offset);
    }
    return v;
}

template <Bug bug>
__device__ void reduce(const float *x, float *sums, int n) {
    __shared__ float partial[32];
    const int last = bug == OFF_BY_ONE ? n + 1 : n;
    float v = 0.0f;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < last; i += gridDim.x * blockDim.x) {
        v += x[i];
    }
    if (bug == INACTIVE_LANE) {
        if (threadIdx.x % 32 < 17) { // lane 1 asks lane 17, which does not take part
            v += __shfl_xor_sync(0x1ffffu, v, 16);
        }
    }
    v = sum_of_warp(v);
    if (threadIdx.x % 32 == 0) {
        partial[threadIdx.x / 32] = v;
    }
    if (bug != DROPPED_BARRIER) {
        __syncthreads(); // partials written above are read below
    }
    if (threadIdx.x < 32) {
        const int warps = bug == UNINITIALISED ? 32 : blockDim.x / 32;
        v = threadIdx.x < warps ? partial[threadIdx.x] : 0.0f;
        v = sum_of_warp(v);
        if (threadIdx.x == 0) {
            sums[bug == GLOBAL_RACE ? 0 : blockIdx.x] = v;
        }
    }
}

extern "C" __global__ void reduce_sum(const float *x, float *sums, int n) { reduce<NONE>(x, sums, n); }
extern "C" __global__ void reduce_dropped_barrier(const float *x, float *sums, int n) {
    reduce<DROPPED_BARRIER>(x, sums, n);
}
extern "C" __global__ void reduce_off_by_one(const float *x, float *sums, int n) { reduce<OFF_BY_ONE>(x, sums, n); }
extern "C" __global__ void reduce_uninitialised(const float *x, float *sums, int n) {
    reduce<UNINITIALISED>(x, sums, n);
}
extern "C" __global__ void reduce_inactive_lane(const float *x, float *sums, int n) {
    reduce<INACTIVE_LANE>(x, sums, n);
}
extern "C" __global__ void reduce_global_race(const float *x, float *sums, int n) { reduce<GLOBAL_RACE>(x, sums, n); }
