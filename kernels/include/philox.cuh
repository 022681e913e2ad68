// Counter-based random numbers, as in src/rng.rs: Philox 4x32-10 (Salmon et al. 2011) with the seed as key and (block,
// stream, step, purpose) as counter. Integers and normals have the CPU's bits: __fmul_rn and __fadd_rn keep the
// normals' sums and products from being fused, as on the CPU.
#pragma once
#include <cstdint>

// Host twin: threads per block of the kernels that draw random numbers; a thread has four neighbours of an image, which
// is one Philox block.
constexpr int THREADS = 256;

// Host twin: where random numbers come from. Image i of a batch draws from stream `stream + i`.
struct Stream {
    uint32_t seed_lo, seed_hi;  // the seed, the key
    uint32_t step;              // training step, or timestep of the reverse process
    uint32_t purpose;           // a value of rng::Purpose
    uint32_t stream;            // image, layer or parameter, as the purpose says
};

// The stream of the batch's image i.
__device__ __forceinline__ Stream of_image(Stream s, uint32_t i) {
    s.stream += i;
    return s;
}

// The same stream for another purpose.
__device__ __forceinline__ Stream for_purpose(Stream s, uint32_t purpose) {
    s.purpose = purpose;
    return s;
}

__device__ __forceinline__ uint4 philox(const Stream& s, uint32_t block) {
    uint4 c = make_uint4(block, s.stream, s.step, s.purpose);
    uint32_t k0 = s.seed_lo, k1 = s.seed_hi;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t h0 = __umulhi(0xD2511F53u, c.x), l0 = 0xD2511F53u * c.x;
        const uint32_t h1 = __umulhi(0xCD9E8D57u, c.z), l1 = 0xCD9E8D57u * c.z;
        c = make_uint4(h1 ^ c.y ^ k0, l1, h0 ^ c.w ^ k1, l0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// Natural logarithm of a positive normal number, to 2 ulp; see src/rng.rs.
__device__ __forceinline__ float philox_ln(float u) {
    const int e = int(__float_as_uint(u) - 0x3f3504f3u) >> 23;
    const float f = __fadd_rn(__uint_as_float(__float_as_uint(u) - (uint32_t(e) << 23)), -1.0f);
    float p = __fadd_rn(0.12761576f, __fmul_rn(f, -7.634496e-2f));
    p = __fadd_rn(-0.13160183f, __fmul_rn(f, p));
    p = __fadd_rn(0.14201759f, __fmul_rn(f, p));
    p = __fadd_rn(-0.16623357f, __fmul_rn(f, p));
    p = __fadd_rn(0.20001227f, __fmul_rn(f, p));
    p = __fadd_rn(-0.2500082f, __fmul_rn(f, p));
    p = __fadd_rn(0.3333333f, __fmul_rn(f, p));
    const float half_square = __fmul_rn(__fmul_rn(0.5f, f), f);
    const float rest = __fmul_rn(__fmul_rn(f, f), __fmul_rn(f, p));
    return __fadd_rn(__fmul_rn(float(e), 0.6931472f), __fadd_rn(__fsub_rn(f, half_square), rest));
}

// Two independent standard normals from two words (Box and Muller 1958): see src/rng.rs.
__device__ __forceinline__ float2 box_muller(uint32_t magnitude, uint32_t angle) {
    const float u = __fadd_rn(__fmul_rn(float(magnitude), 1.0f / 4294967296.0f), 1.0f / 8589934592.0f);
    const float r = __fsqrt_rn(__fmul_rn(-2.0f, philox_ln(u)));
    const int offset = int(angle << 2) >> 7;
    const float x = __fmul_rn(float(offset), 0.78539816339744831f / 16777216.0f);
    const float z = __fmul_rn(x, x);
    const float sin_poly = __fadd_rn(8.33216e-3f, __fmul_rn(z, -1.9515282e-4f));
    const float sine = __fadd_rn(x, __fmul_rn(__fmul_rn(x, z), __fadd_rn(-0.16666655f, __fmul_rn(z, sin_poly))));
    const float cos_poly = __fadd_rn(-1.3887316e-3f, __fmul_rn(z, 2.4433157e-5f));
    const float cosine = __fadd_rn(__fsub_rn(1.0f, __fmul_rn(0.5f, z)),
                                   __fmul_rn(__fmul_rn(z, z), __fadd_rn(4.1666646e-2f, __fmul_rn(z, cos_poly))));
    // (cos, sin) in the quadrants: (c, s), (-s, c), (-c, -s), (s, -c).
    const uint32_t quadrant = angle >> 30;
    const bool odd = quadrant & 1;
    const float a = odd ? sine : cosine, b = odd ? cosine : sine;
    const float first = __uint_as_float(__float_as_uint(a) ^ (((quadrant ^ (quadrant >> 1)) & 1u) << 31));
    const float second = __uint_as_float(__float_as_uint(b) ^ ((quadrant >> 1) << 31));
    return make_float2(__fmul_rn(r, first), __fmul_rn(r, second));
}

// Elements 4 block .. 4 block + 3 of the stream, as standard normals.
__device__ __forceinline__ float4 normals(const Stream& s, uint32_t block) {
    const uint4 w = philox(s, block);
    const float2 a = box_muller(w.x, w.y), b = box_muller(w.z, w.w);
    return make_float4(a.x, a.y, b.x, b.y);
}

// An unbiased integer, uniform on 0..n (Lemire 2019): takes words until one is accepted.
__device__ __forceinline__ uint32_t below(const Stream& s, uint32_t n) {
    const uint32_t refused = (0u - n) % n;
    for (uint32_t block = 0;; ++block) {
        const uint4 w = philox(s, block);
        if (w.x * n >= refused) return __umulhi(w.x, n);
        if (w.y * n >= refused) return __umulhi(w.y, n);
        if (w.z * n >= refused) return __umulhi(w.z, n);
        if (w.w * n >= refused) return __umulhi(w.w, n);
    }
}
