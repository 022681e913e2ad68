// time_embedding: sines and cosines of timesteps.
//
// computes   y[i, sines + k] = sin(scale t_i f_k), y[i, cosines + k] = cos(scale t_i f_k),
//            f_k = exp(-log_period k / spread), k < dim/2; an odd dim ends with 0
// layout     t (n) f32, or if each is 0 the one that all have, that of a turn (sample_step.cu); y (n, dim) f32 or bf16
// mapping    rows.cuh, 128 threads: row = image, item = one k
// shared     none
// bound by   latency, of some 150 instructions in f64: 128 images of 128 features are 1.2 M of them, 2 us of an RTX
//            4090, which does 1/64 of its f32 rate in f64
// host       dim >= 2; spread >= 1; sines and cosines are 0 and dim/2 in either order; each is 1 or 0
// numerics   f64, rounded once. sincospi takes the angle in half turns: its range reduction is exact and, unlike that
//            of sin, needs no table in local memory
#include "dtype.cuh"
#include "rows.cuh"

template <class T>
__device__ __forceinline__ void fwd(T* y,            // (n, dim)
                                    const float* t,  // (n)
                                    size_t n, unsigned dim, double scale, double log_period, double spread,
                                    unsigned sines, unsigned cosines, unsigned lane_bits, unsigned each) {
    const size_t image = row_of_thread(lane_bits);
    if (image >= n) return;
    y += image * dim;
    each_item(dim / 2, lane_bits, [&](unsigned k) {
        const double angle = double(t[image * each]) * scale * exp(-log_period * double(k) / spread);
        double sine, cosine;
        sincospi(angle * 0.31830988618379067154, &sine, &cosine);  // 1 / pi
        store(y + sines + k, float(sine));
        store(y + cosines + k, float(cosine));
        if (k == 0 && dim % 2 == 1) store(y + dim - 1, 0.0f);
    });
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(128) time_embedding_fwd_##suffix(                                   \
        T* y, const float* t, size_t n, unsigned dim, double scale, double log_period, double spread,                \
        unsigned sines, unsigned cosines, unsigned lane_bits, unsigned each) {                                       \
        fwd(y, t, n, dim, scale, log_period, spread, sines, cosines, lane_bits, each);                               \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
