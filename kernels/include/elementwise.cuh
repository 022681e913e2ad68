// Element-wise kernels: a thread has four neighbours, a block of 256 threads 1024; the last group may be short. Tensors start on 256-byte
// boundaries, so whole groups are read and written as one access.
#pragma once
#include "dtype.cuh"

// Number of the thread's first element.
__device__ __forceinline__ size_t first_element() { return 4 * (size_t(blockIdx.x) * blockDim.x + threadIdx.x); }

// y[i] = f(a[i]) for this thread's group.
template <class T, class F>
__device__ __forceinline__ void map1(T* y, const T* a, size_t len, F f) {
    const size_t i = first_element();
    if (i + 4 <= len) {
        const float4 va = load4(a + i);
        store4(y + i, make_float4(f(va.x), f(va.y), f(va.z), f(va.w)));
    } else {
        for (size_t k = i; k < len; ++k) store(y + k, f(load(a + k)));
    }
}

// y[i] = f(a[i], b[i]) for this thread's group; y may be a or b.
template <class T, class F>
__device__ __forceinline__ void map2(T* y, const T* a, const T* b, size_t len, F f) {
    const size_t i = first_element();
    if (i + 4 <= len) {
        const float4 va = load4(a + i), vb = load4(b + i);
        store4(y + i, make_float4(f(va.x, vb.x), f(va.y, vb.y), f(va.z, vb.z), f(va.w, vb.w)));
    } else {
        for (size_t k = i; k < len; ++k) store(y + k, f(load(a + k), load(b + k)));
    }
}
