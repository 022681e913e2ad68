// Element-wise kernels. Tensors start on 256-byte boundaries, so every group of four but a short last one takes one
// access.
//
// mapping    block = 256 threads = 1024 elements, thread = 4 neighbours. With noise, that is one Philox block per
//            thread, and random numbers never leave registers: element k takes word k % 4 of Philox block k / 4
//
//            element   0 1 2 3 | 4 5 6 7 | 8 9 10 11 | ...
//            thread       0    |    1    |     2     | ...
#pragma once
#include "dtype.cuh"

// Index of the thread's first element.
__device__ __forceinline__ size_t first_element() { return 4 * (size_t(blockIdx.x) * blockDim.x + threadIdx.x); }

// Number of the thread's elements, from i on, that exist: 1 to 4 if i < len.
__device__ __forceinline__ unsigned group_size(size_t i, size_t len) { return i + 4 <= len ? 4 : unsigned(len - i); }

// y[i] = f(a[i]) for this thread's group.
template <class T, class F>
__device__ __forceinline__ void map1(T* y, const T* a, size_t len, F f) {
    const size_t i = first_element();
    if (i >= len) return;
    const unsigned count = group_size(i, len);
    const float4 u = load_group(a, i, count, count == 4);
    store_group(y, i, make_float4(f(u.x), f(u.y), f(u.z), f(u.w)), count, count == 4);
}

// y[i] = f(a[i], b[i]) for this thread's group; y may be a or b.
template <class T, class F>
__device__ __forceinline__ void map2(T* y, const T* a, const T* b, size_t len, F f) {
    const size_t i = first_element();
    if (i >= len) return;
    const unsigned count = group_size(i, len);
    const float4 u = load_group(a, i, count, count == 4), v = load_group(b, i, count, count == 4);
    store_group(y, i, make_float4(f(u.x, v.x), f(u.y, v.y), f(u.z, v.z), f(u.w, v.w)), count, count == 4);
}
