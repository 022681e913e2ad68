// upsample: nearest neighbour, by two in both directions.
//
// computes   fwd: y[n, i, j, k] = x[n, i/2, j/2, k];  bwd: dx[n, i, j, k] = the four dy above it, (a + b) + (d + e)
// layout     x, dx (n, h, w, c), y, dy (n, 2h, 2w, c), f32 or bf16
// mapping    thread = one element of x (fwd, which writes four) or dx (bwd, which reads four); neighbours along the channels
// shared     none
// bound by   memory: 5 elements moved for each of x
// host       nothing
// numerics   fwd copies; bwd sums in f32, one rounding to T
#include "dtype.cuh"

// Where the upper left of the four pixels above element i of x starts, and the distances to the others.
struct Above {
    size_t at, right, below;
};

__device__ __forceinline__ Above above(size_t i, unsigned w, unsigned c) {
    const size_t pixel = i / c, row = pixel / w;
    const size_t k = i - pixel * c, column = pixel - row * w;
    return {((2 * row) * (2 * size_t(w)) + 2 * column) * c + k, c, 2 * size_t(w) * c};
}

template <class T>
__device__ __forceinline__ void fwd(T* y, const T* x, size_t len, unsigned w, unsigned c) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= len) return;
    const Above p = above(i, w, c);
    const T v = x[i];
    y[p.at] = v;
    y[p.at + p.right] = v;
    y[p.at + p.below] = v;
    y[p.at + p.below + p.right] = v;
}

template <class T>
__device__ __forceinline__ void bwd(T* dx, const T* dy, size_t len, unsigned w, unsigned c) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= len) return;
    const Above p = above(i, w, c);
    const float upper = load(dy + p.at) + load(dy + p.at + p.right);
    const float lower = load(dy + p.at + p.below) + load(dy + p.at + p.below + p.right);
    store(dx + i, upper + lower);
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) upsample_fwd_##suffix(T* y, const T* x, size_t len, unsigned w, unsigned c) { \
        fwd(y, x, len, w, c);                                                                                        \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) upsample_bwd_##suffix(T* dx, const T* dy, size_t len, unsigned w, unsigned c) { \
        bwd(dx, dy, len, w, c);                                                                                      \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
