// adam: the whole parameter update in one kernel: clipping, Adam or AdamW, the moving average, and both rounded to bf16.
//
// computes   g = clip g;  m += one_beta1 (g - m);  v = beta2 v + one_beta2 g^2;  w = keep w - rate m / (unbias sqrt(v) + eps);
//            ema += one_ema (w - ema);  rounded = bf16(w), ema_rounded = bf16(ema) unless null. Nothing at all if *halt.
// layout     flat f32 buffers of len; row[CLIP] as grad_norm left it
// mapping    thread = 4 neighbours, block = 1024 elements
// shared     none
// bound by   memory: 20 bytes read and 16 (20 with both copies) written a parameter
// host       len is a multiple of 4, buffers start on 256-byte boundaries
// numerics   f32 in the CPU's order of operations; division and root rounded correctly, so the bits are the CPU's for equal gradients and clip
#include "dtype.cuh"

constexpr int CLIP = 9;

struct Factors {
    float clip, keep, one_beta1, beta2, one_beta2, rate, unbias, eps, one_ema;
};

__device__ __forceinline__ void update(float& w, float& ema, float& m, float& v, float g, const Factors& f) {
    g = __fmul_rn(f.clip, g);
    m = fmaf(f.one_beta1, __fsub_rn(g, m), m);
    v = fmaf(__fmul_rn(f.one_beta2, g), g, __fmul_rn(f.beta2, v));
    const float denominator = fmaf(f.unbias, __fsqrt_rn(v), f.eps);
    w = fmaf(f.keep, w, -__fdiv_rn(__fmul_rn(f.rate, m), denominator));
    ema = fmaf(f.one_ema, __fsub_rn(w, ema), ema);
}

extern "C" __global__ void __launch_bounds__(256) adam_update(float* w, float* ema, float* m, float* v, bf16* rounded, bf16* ema_rounded, const float* g, const double* row, const unsigned* halt, size_t len, float keep, float one_beta1, float beta2, float one_beta2, float rate, float unbias, float eps, float one_ema) {
    const size_t i = 4 * (size_t(blockIdx.x) * blockDim.x + threadIdx.x);
    if (i >= len || *halt) return;
    const Factors f = {float(row[CLIP]), keep, one_beta1, beta2, one_beta2, rate, unbias, eps, one_ema};
    float4 w4 = load4(w + i), ema4 = load4(ema + i), m4 = load4(m + i), v4 = load4(v + i);
    const float4 g4 = load4(g + i);
    update(w4.x, ema4.x, m4.x, v4.x, g4.x, f);
    update(w4.y, ema4.y, m4.y, v4.y, g4.y, f);
    update(w4.z, ema4.z, m4.z, v4.z, g4.z, f);
    update(w4.w, ema4.w, m4.w, v4.w, g4.w, f);
    store4(w + i, w4);
    store4(ema + i, ema4);
    store4(m + i, m4);
    store4(v + i, v4);
    if (rounded != nullptr) store4(rounded + i, w4);
    if (ema_rounded != nullptr) store4(ema_rounded + i, ema4);
}
