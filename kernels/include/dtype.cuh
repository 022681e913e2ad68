// Element types of activations and gradients, f32 and bf16, and loads and stores of one and of up to four elements.
// Accumulators and statistics are f32 or f64 whatever the type.
#pragma once
#include <cuda_bf16.h>

using bf16 = __nv_bfloat16;

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const bf16* p) { return __bfloat162float(*p); }

// Rounds to nearest, ties to even.
__device__ __forceinline__ void store(float* p, float v) { *p = v; }
__device__ __forceinline__ void store(bf16* p, float v) { *p = __float2bfloat16_rn(v); }

// Four neighbours in one access: p is aligned to four elements (16 bytes of f32, 8 of bf16).
__device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ __forceinline__ float4 load4(const bf16* p) {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    // A bf16 is the upper half of the f32 of the same value.
    return make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u),  //
                       __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xffff0000u));
}
__device__ __forceinline__ void store4(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }
__device__ __forceinline__ void store4(bf16* p, float4 v) {
    const __nv_bfloat162 lo = __floats2bfloat162_rn(v.x, v.y), hi = __floats2bfloat162_rn(v.z, v.w);
    *reinterpret_cast<uint2*>(p) =
        make_uint2(*reinterpret_cast<const unsigned*>(&lo), *reinterpret_cast<const unsigned*>(&hi));
}

// Up to four neighbours, p[i] .. p[i + 4], of which the first `count` (1 to 4) exist; the others load as zero and are
// not stored. `vector`: all four exist and are aligned, so one access moves them.
template <class T>
__device__ __forceinline__ float4 load_group(const T* p, size_t i, unsigned count, bool vector) {
    if (vector) return load4(p + i);
    float4 v = make_float4(load(p + i), 0.0f, 0.0f, 0.0f);
    if (count > 1) v.y = load(p + i + 1);
    if (count > 2) v.z = load(p + i + 2);
    if (count > 3) v.w = load(p + i + 3);
    return v;
}
template <class T>
__device__ __forceinline__ void store_group(T* p, size_t i, float4 v, unsigned count, bool vector) {
    if (vector) return store4(p + i, v);
    store(p + i, v.x);
    if (count > 1) store(p + i + 1, v.y);
    if (count > 2) store(p + i + 2, v.z);
    if (count > 3) store(p + i + 3, v.w);
}

// Four neighbouring results of a thread in a row of `cols` columns: those that exist, in one access if four divides
// cols.
struct Four {
    unsigned col, count;
    bool vector;
    __device__ __forceinline__ Four(unsigned col_, unsigned cols)
        : col(col_), count(col < cols ? min(cols - col, 4u) : 0), vector(cols % 4 == 0) {}

    template <class T>
    __device__ __forceinline__ float4 read(const T* p) const { return load_group(p, 0, count, vector); }

    template <class T>
    __device__ __forceinline__ void write(T* p, float4 v) const { store_group(p, 0, v, count, vector); }
};

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// A tensor as 16 bytes at a time, for copies, and how many elements they hold.
template <class T>
constexpr unsigned WIDE = sizeof(uint4) / sizeof(T);
template <class T>
__device__ __forceinline__ uint4* wide(T* p) { return reinterpret_cast<uint4*>(p); }
template <class T>
__device__ __forceinline__ const uint4* wide(const T* p) { return reinterpret_cast<const uint4*>(p); }

// Instantiates ENTRY(suffix, T) for both types; ENTRY defines `extern "C" __global__ void stem_part_##suffix(...)`.
#define F32_AND_BF16(ENTRY) ENTRY(f32, float) ENTRY(bf16, bf16)
