// Reductions over a warp and over a block, in a fixed order: the same bits every time.
#pragma once

// Sum over the 32 lanes of a full warp; every lane gets the result.
template <class T>
__device__ __forceinline__ T warp_sum(T v) {
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
    for (int offset = 16; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
    return v;
}

// Sum over a block of THREADS (a multiple of 32, at most 1024) threads; every thread gets it. `scratch` is THREADS/32
// elements of shared memory, which may be reused when the call returns.
template <int THREADS, class T>
__device__ __forceinline__ T block_sum(T v, T* scratch) {
    static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole warps, and at most one sum a lane");
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();  // the warps' sums written above are read below
    T sum = scratch[0];
    for (int w = 1; w < THREADS / 32; ++w) sum += scratch[w];
    __syncthreads();  // all have read before a caller writes scratch again
    return sum;
}
