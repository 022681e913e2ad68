// Instructions that C++ has no names for: asynchronous copies, matrix loads and matrix products.
#pragma once
#include <cstdint>

#include "dtype.cuh"

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Copies 16 bytes to shared memory, past the L1 cache; unless `inside` it writes zeros and reads nothing. Arrives when
// its group is waited for.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

// The same for 4 bytes.
__device__ __forceinline__ void copy_word_async(uint32_t to, const void* from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(inside ? 4 : 0) : "memory");
}

__device__ __forceinline__ void commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All but the YOUNGEST last committed groups of this thread have arrived.
template <int YOUNGEST>
__device__ __forceinline__ void wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(YOUNGEST) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t to, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ float4 load_shared(uint32_t from) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

__device__ __forceinline__ float load_shared_bf16(uint32_t from) {
    unsigned short v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(from) : "memory");
    return __uint_as_float(uint32_t(v) << 16);
}

// Stores four neighbours to global memory, in one access where the compiler would make four of `store4`.
__device__ __forceinline__ void store_global(float* p, float4 v) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "f"(v.x), "f"(v.y),
                 "f"(v.z), "f"(v.w)
                 : "memory");
}

// Four matrices of 8x8 elements. Lane 8 i + j has the address of row j of matrix i; lane l gets elements 2 (l % 4) and
// the next of row l / 4 of each, or of column l / 4 if TRANS.
template <bool TRANS>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t row) {
    if (TRANS) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(row)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(row)
                     : "memory");
    }
}

// d += a b, 16 x 8 results over 16 steps of k. With g = lane / 4 and t = lane % 4 a lane has
//     of a, 16 x 16     rows g, g + 8, g, g + 8      k 2t, 2t, 2t + 8, 2t + 8    and the next k, in four registers
//     of b, 16 x 8      column g                     k 2t, 2t + 8                and the next k, in two
//     of d, 16 x 8      rows g, g, g + 8, g + 8      columns 2t, 2t + 1, 2t, 2t + 1
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds to tf32, 10 bits of fraction, to nearest, ties away from zero: an f32 whose last 13 bits are zero.
__device__ __forceinline__ float to_tf32(float v) {
    uint32_t rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(v));
    return __uint_as_float(rounded);
}

// d += a b, 16 x 8 results over 8 steps of k in tf32. With g = lane / 4 and t = lane % 4 a lane has
//     of a, 16 x 8      rows g, g + 8, g, g + 8      k t, t, t + 4, t + 4                in four registers
//     of b, 8 x 8       column g                     k t, t + 4                          in two
//     of d, 16 x 8      rows g, g, g + 8, g + 8      columns 2t, 2t + 1, 2t, 2t + 1
__device__ __forceinline__ void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
