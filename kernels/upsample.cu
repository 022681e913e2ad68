// upsample: nearest neighbour, by two in both directions.
//
// computes   fwd: y[n, i, j, k] = x[n, i/2, j/2, k];  bwd: dx[n, i, j, k] = (a + b) + (d + e), its four dy
// layout     x, dx (n, h, w, c), y, dy (n, 2h, 2w, c), f32 or bf16; len = n h w c
// mapping    block = 256 elements of x (fwd) or dx (bwd), neighbours along the channels;
//            thread = one element, and its four of y or dy
// shared     none
// bound by   memory: 5 elements moved per element of x
// host       grid.x = ceil(len / 256)
// numerics   fwd copies; bwd sums in f32, one rounding to T
#include "dtype.cuh"

// The four elements of y (or dy) for one of x: the index of the upper left, and the offsets to its neighbours.
struct Above {
    size_t offset, right, below;
};

__device__ __forceinline__ Above above(size_t i, unsigned w, unsigned c) {
    const size_t pixel = i / c, row = pixel / w;
    const size_t k = i - pixel * c, column = pixel - row * w;
    return {((2 * row) * (2 * size_t(w)) + 2 * column) * c + k, c, 2 * size_t(w) * c};
}

template <class T>
__device__ __forceinline__ void fwd(T* y,        // (n, 2h, 2w, c)
                                    const T* x,  // (n, h, w, c)
                                    size_t len, unsigned w, unsigned c) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= len) return;
    const Above p = above(i, w, c);
    const T v = x[i];
    y[p.offset] = v;
    y[p.offset + p.right] = v;
    y[p.offset + p.below] = v;
    y[p.offset + p.below + p.right] = v;
}

template <class T>
__device__ __forceinline__ void bwd(T* dx,        // (n, h, w, c)
                                    const T* dy,  // (n, 2h, 2w, c)
                                    size_t len, unsigned w, unsigned c) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= len) return;
    const Above p = above(i, w, c);
    const float upper = load(dy + p.offset) + load(dy + p.offset + p.right);
    const float lower = load(dy + p.offset + p.below) + load(dy + p.offset + p.below + p.right);
    store(dx + i, upper + lower);
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) upsample_fwd_##suffix(                                         \
        T* y, const T* x, size_t len, unsigned w, unsigned c) {                                                      \
        fwd(y, x, len, w, c);                                                                                        \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) upsample_bwd_##suffix(                                         \
        T* dx, const T* dy, size_t len, unsigned w, unsigned c) {                                                    \
        bwd(dx, dy, len, w, c);                                                                                      \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
