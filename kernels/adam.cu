// adam: the whole parameter update in one kernel: clipping, Adam or AdamW, the moving average, and a bf16 copy of the
// weights.
//
// computes   update: g = clip g;  m += one_beta1 (g - m);  v = beta2 v + one_beta2 g^2;
//            w = keep w - rate m / (unbias sqrt(v) + eps);  ema += one_ema (w - ema);
//            rounded = bf16(w) unless null. Does nothing if *halt.
//            round: rounded = bf16(w)
// layout     flat f32 buffers of len elements; clip is read from the meter's row, where grad_norm wrote it
// mapping    thread = 4 neighbours, block = 1024 elements
// shared     none
// bound by   memory: 20 bytes read and 16 (18 with the copy) written per parameter; round: 4 and 2
// host       len is a multiple of 4, buffers start on 256-byte boundaries; the clock is null or the step's (clock.cuh)
// numerics   f32 in the CPU's order of operations, with correctly rounded division and square root: the CPU's bits for
//            equal gradients and clip, if the CPU has FMA
#include "clock.cuh"
#include "dtype.cuh"
#include "meter.cuh"

__device__ __forceinline__ void update(float& w, float& ema, float& m, float& v, float g, float clip,
                                       const AdamFactors& f) {
    g = __fmul_rn(clip, g);
    m = fmaf(f.one_beta1, __fsub_rn(g, m), m);
    v = fmaf(__fmul_rn(f.one_beta2, g), g, __fmul_rn(f.beta2, v));
    const float denominator = fmaf(f.unbias, __fsqrt_rn(v), f.eps);
    w = fmaf(f.keep, w, -__fdiv_rn(__fmul_rn(f.rate, m), denominator));
    ema = fmaf(f.one_ema, __fsub_rn(w, ema), ema);
}

extern "C" __global__ void __launch_bounds__(THREADS) adam_update(
    float* w, float* ema, float* m, float* v, bf16* rounded, const float* g, const MeterRow* rows,
    const unsigned* halt, size_t len, AdamFactors factors, const Clock* clock) {
    const size_t i = 4 * (size_t(blockIdx.x) * blockDim.x + threadIdx.x);
    if (i >= len || *halt) return;
    const float clip = float(row_of_step(rows, clock)->clip);
    const AdamFactors f = clock != nullptr ? clock->adam : factors;
    float4 w4 = load4(w + i), ema4 = load4(ema + i), m4 = load4(m + i), v4 = load4(v + i);
    const float4 g4 = load4(g + i);
    update(w4.x, ema4.x, m4.x, v4.x, g4.x, clip, f);
    update(w4.y, ema4.y, m4.y, v4.y, g4.y, clip, f);
    update(w4.z, ema4.z, m4.z, v4.z, g4.z, clip, f);
    update(w4.w, ema4.w, m4.w, v4.w, g4.w, clip, f);
    store4(w + i, w4);
    store4(ema + i, ema4);
    store4(m + i, m4);
    store4(v + i, v4);
    if (rounded != nullptr) store4(rounded + i, w4);
}

extern "C" __global__ void __launch_bounds__(THREADS) adam_round(bf16* rounded, const float* w, size_t len) {
    const size_t i = 4 * (size_t(blockIdx.x) * blockDim.x + threadIdx.x);
    if (i < len) store4(rounded + i, load4(w + i));
}
