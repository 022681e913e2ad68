// concat: two tensors side by side along the channels, and apart again.
//
// computes   join: y[r] = [a[r], b[r]] for each row (pixel) r;  part: d[r] = dy[r][first .. first + c]
// layout     rows of ca, cb and ca + cb channels, f32 or bf16
// mapping    thread = one element of the wider side (join: of y; part: of d), neighbours along the channels
// shared     none
// bound by   memory: one read and one write an element
// host       nothing
// numerics   copies
#include "dtype.cuh"

template <class T>
__device__ __forceinline__ void join(T* y, const T* a, const T* b, size_t rows, unsigned ca, unsigned cb) {
    const unsigned c = ca + cb;
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= rows * c) return;
    const size_t row = i / c;
    const unsigned k = unsigned(i - row * c);
    y[i] = k < ca ? a[row * ca + k] : b[row * cb + (k - ca)];
}

template <class T>
__device__ __forceinline__ void part(T* d, const T* dy, size_t rows, unsigned c, unsigned whole, unsigned first) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= rows * c) return;
    const size_t row = i / c;
    d[i] = dy[row * whole + first + unsigned(i - row * c)];
}

#define ENTRY(suffix, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) concat_join_##suffix(T* y, const T* a, const T* b, size_t rows, unsigned ca, unsigned cb) { \
        join(y, a, b, rows, ca, cb);                                                                                \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256) concat_part_##suffix(T* d, const T* dy, size_t rows, unsigned c, unsigned whole, unsigned first) { \
        part(d, dy, rows, c, whole, first);                                                                         \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
