// time_embedding: sines and cosines of timesteps.
//
// computes   y[i, sines + k] = sin(t_i f_k), y[i, cosines + k] = cos(t_i f_k), f_k = exp(-log_period k / spread),
//            k < dim/2; an odd dim ends with 0
// layout     t (n) f32; y (n, dim) f32 or bf16
// mapping    block = 128 pairs (image, k), thread = one pair
// shared     none
// bound by   latency: a few kilobytes
// host       grid.x = ceil(n (dim/2) / 128); dim >= 2; spread >= 1; sines and cosines are 0 and dim/2 in either order
// numerics   f64, rounded once. sincospi takes the angle in half turns: its range reduction is exact and, unlike that
//            of sin, needs no table in local memory
#include "dtype.cuh"

template <class T>
__device__ __forceinline__ void fwd(T* y,            // (n, dim)
                                    const float* t,  // (n)
                                    size_t n, unsigned dim, double log_period, double spread, unsigned sines,
                                    unsigned cosines) {
    const unsigned half = dim / 2;
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n * half) return;
    const size_t image = i / half;
    const unsigned k = unsigned(i - image * half);
    const double angle = double(t[image]) * exp(-log_period * double(k) / spread);
    double sine, cosine;
    sincospi(angle * 0.31830988618379067154, &sine, &cosine);  // 1 / pi
    store(y + image * dim + sines + k, float(sine));
    store(y + image * dim + cosines + k, float(cosine));
    if (k == 0 && dim % 2 == 1) store(y + image * dim + dim - 1, 0.0f);
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(128) time_embedding_fwd_##suffix(                                   \
        T* y, const float* t, size_t n, unsigned dim, double log_period, double spread, unsigned sines,              \
        unsigned cosines) {                                                                                          \
        fwd(y, t, n, dim, log_period, spread, sines, cosines);                                                       \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
