// embedding: a table row per image, added to add_to.
//
// computes   fwd: y[i, k] = add_to[i, k] + table[labels[i], k];
//            bwd: dtable[r, k] = sum of dy[i, k] over the i with labels[i] = r, or that much more if accumulate
// layout     y, add_to, dy (n, c) of f32 or bf16; table, dtable (classes, c) f32; labels (n) f32, whole numbers
// mapping    rows.cuh, 256 threads: row = image (fwd) or class (bwd), item = one element; in bwd it loops over the
//            images in order
// shared     none
// bound by   latency: a few kilobytes
// host       labels are below the number of classes
// numerics   f32, one rounding to T; bwd adds in the order of the images
#include "dtype.cuh"
#include "rows.cuh"

template <class T>
__device__ __forceinline__ void fwd(T* y, const T* add_to,  // (n, c)
                                    const float* table,     // (classes, c)
                                    const float* labels,    // (n)
                                    unsigned n, unsigned c, unsigned lane_bits) {
    const size_t image = row_of_thread(lane_bits);
    if (image >= n) return;
    table += size_t(labels[image]) * c;
    y += image * c, add_to += image * c;
    each_item(c, lane_bits, [&](unsigned k) { store(y + k, load(add_to + k) + table[k]); });
}

template <class T>
__device__ __forceinline__ void bwd(float* dtable,        // (classes, c)
                                    const T* dy,          // (n, c)
                                    const float* labels,  // (n)
                                    unsigned classes, unsigned n, unsigned c, unsigned accumulate,
                                    unsigned lane_bits) {
    const size_t row = row_of_thread(lane_bits);
    if (row >= classes) return;
    dtable += row * c;
    each_item(c, lane_bits, [&](unsigned k) {
        float sum = accumulate ? dtable[k] : 0.0f;
        for (unsigned image = 0; image < n; ++image) {
            if (size_t(labels[image]) == row) sum += load(dy + size_t(image) * c + k);
        }
        dtable[k] = sum;
    });
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) embedding_fwd_##suffix(                                        \
        T* y, const T* add_to, const float* table, const float* labels, unsigned n, unsigned c,                      \
        unsigned lane_bits) {                                                                                        \
        fwd(y, add_to, table, labels, n, c, lane_bits);                                                              \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) embedding_bwd_##suffix(                                        \
        float* dtable, const T* dy, const float* labels, unsigned classes, unsigned n, unsigned c,                   \
        unsigned accumulate, unsigned lane_bits) {                                                                   \
        bwd(dtable, dy, labels, classes, n, c, accumulate, lane_bits);                                               \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
