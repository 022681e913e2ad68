// f16 and bf16: scalar and packed intrinsics, conversions, comparisons.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" __global__ void half2_math(const half2 *a, const half2 *b, half2 *out, int n) {
    const int i = threadIdx.x;
    if (i < n) {
        const half2 sum = __hadd2(a[i], b[i]), product = __hmul2(a[i], b[i]);
        out[4 * i] = __hfma2(a[i], b[i], sum);
        out[4 * i + 1] = __hmax2(sum, product);
        out[4 * i + 2] = __hsub2(sum, __half2half2(__low2half(product)));
        out[4 * i + 3] = h2rcp(__hadd2(__habs2(a[i]), __float2half2_rn(1.0f)));
    }
}

extern "C" __global__ void half_scalar(const float *in, half *out, int n) {
    const int i = threadIdx.x;
    if (i < n) {
        const half h = __float2half(in[i]);
        half r = __hlt(h, __float2half(0.0f)) ? __hneg(h) : h;
        r = hexp(__hmul(r, __float2half(-0.25f)));
        out[2 * i] = r;
        out[2 * i + 1] = __int2half_rn(__half2int_rz(__hmul(h, __float2half(8.0f))));
    }
}

extern "C" __global__ void bf16_math(const __nv_bfloat162 *a, const __nv_bfloat162 *b, __nv_bfloat162 *out, int n) {
    const int i = threadIdx.x;
    if (i < n) {
        out[3 * i] = __hfma2(a[i], b[i], a[i]);
        out[3 * i + 1] = __hmul2(a[i], b[i]);
        const float2 f = __bfloat1622float2(a[i]);
        out[3 * i + 2] = __floats2bfloat162_rn(f.x * 3.0f, f.y / 3.0f);
    }
}

// Half precision atomics and a mean in f32.
extern "C" __global__ void half_sum(const half *in, half *sum, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        atomicAdd(sum, in[i]);
    }
}
