// concat: joins two tensors along the channels, and takes them apart again.
//
// computes   join: y[r] = [a[r], b[r]] for each row (pixel) r;  part: d[r] = dy[r][first .. first + c]
// layout     a (rows, ca), b (rows, cb), y (rows, ca + cb); d (rows, c), dy (rows, whole): f32 or bf16
// mapping    block = 256 elements of y (join) or d (part), thread = one element; neighbours along the channels
// shared     none
// bound by   memory: one read and one write per element
// host       grid.x = ceil(elements / 256); first + c <= whole
// numerics   copies
#include "dtype.cuh"

template <class T>
__device__ __forceinline__ void join(T* y,        // (rows, ca + cb)
                                     const T* a,  // (rows, ca)
                                     const T* b,  // (rows, cb)
                                     size_t rows, unsigned ca, unsigned cb) {
    const unsigned c = ca + cb;
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= rows * c) return;
    const size_t row = i / c;
    const unsigned k = unsigned(i - row * c);
    y[i] = k < ca ? a[row * ca + k] : b[row * cb + (k - ca)];
}

template <class T>
__device__ __forceinline__ void part(T* d,         // (rows, c)
                                     const T* dy,  // (rows, whole)
                                     size_t rows, unsigned c, unsigned whole, unsigned first) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= rows * c) return;
    const size_t row = i / c;
    d[i] = dy[row * whole + first + unsigned(i - row * c)];
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) concat_join_##suffix(                                          \
        T* y, const T* a, const T* b, size_t rows, unsigned ca, unsigned cb) {                                       \
        join(y, a, b, rows, ca, cb);                                                                                 \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) concat_part_##suffix(                                          \
        T* d, const T* dy, size_t rows, unsigned c, unsigned whole, unsigned first) {                                \
        part(d, dy, rows, c, whole, first);                                                                          \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
