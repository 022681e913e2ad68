// embedding: a table row per image, added to add_to.
//
// computes   fwd: y[i, k] = add_to[i, k] + table[labels[i], k];
//            bwd: dtable[r, k] = sum of dy[i, k] over the i with labels[i] = r, or that much more if accumulate
// layout     y, add_to, dy (n, c) of f32 or bf16; table, dtable (classes, c) f32; labels (n) f32, whole numbers
// mapping    block = 256 elements of y (fwd) or dtable (bwd), thread = one element; in bwd it loops over the
//            images in order
// shared     none
// bound by   latency: a few kilobytes
// host       grid.x = ceil(len / 256), with len the elements of y (fwd) or dtable (bwd); labels are below the
//            number of classes
// numerics   f32, one rounding to T; bwd adds in the order of the images
#include "dtype.cuh"

template <class T>
__device__ __forceinline__ void fwd(T* y, const T* add_to,  // (n, c)
                                    const float* table,     // (classes, c)
                                    const float* labels,    // (n)
                                    size_t len, unsigned c) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= len) return;
    const size_t image = i / c;
    store(y + i, load(add_to + i) + table[size_t(labels[image]) * c + (i - image * c)]);
}

template <class T>
__device__ __forceinline__ void bwd(float* dtable,        // (classes, c)
                                    const T* dy,          // (n, c)
                                    const float* labels,  // (n)
                                    size_t len, unsigned n, unsigned c, unsigned accumulate) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= len) return;
    const size_t row = i / c, k = i - row * c;
    float sum = accumulate ? dtable[i] : 0.0f;
    for (unsigned image = 0; image < n; ++image) {
        if (size_t(labels[image]) == row) sum += load(dy + size_t(image) * c + k);
    }
    dtable[i] = sum;
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) embedding_fwd_##suffix(                                        \
        T* y, const T* add_to, const float* table, const float* labels, size_t len, unsigned c) {                    \
        fwd(y, add_to, table, labels, len, c);                                                                       \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) embedding_bwd_##suffix(                                        \
        float* dtable, const T* dy, const float* labels, size_t len, unsigned n, unsigned c, unsigned accumulate) {  \
        bwd(dtable, dy, labels, len, n, c, accumulate);                                                              \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
