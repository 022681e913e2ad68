// Sums of the columns of a matrix (rows, c): first of chunks of rows, then of the chunks, both in a fixed order. In
// f64, which costs nothing beside the memory: gradients of biases and shifts are sums of many numbers of either sign,
// whose digits would be lost in f32.
#pragma once
#include "dtype.cuh"

// Host twin: threads of a block that sums columns, or parts.
constexpr int SUM_THREADS = 256;

// Sums of `rows` rows from row blockIdx.x * rows on, to row blockIdx.x of `sums` and, rounded, of `rounded` if there is
// one.
//
// Block = SUM_THREADS threads, `lanes` of them (a power of two up to 32) side by side along the columns, the others
// down the rows: few columns still keep every thread busy. blockIdx.y counts groups of `lanes` columns.
template <class T>
__device__ __forceinline__ void sum_rows(double* sums, T* rounded, const T* x, unsigned rows, size_t all_rows,
                                         unsigned c, unsigned lanes) {
    // One partial sum a thread, 2 KB; halved until one row is left.
    __shared__ double part[SUM_THREADS];
    const unsigned t = threadIdx.x, col = blockIdx.y * lanes + t % lanes;
    const size_t first = (size_t)blockIdx.x * rows, last = min(first + rows, all_rows);
    double sum = 0.0;
    if (col < c) {
        for (size_t row = first + t / lanes; row < last; row += SUM_THREADS / lanes) sum += load(x + row * c + col);
    }
    part[t] = sum;
    for (unsigned half = SUM_THREADS / 2; half >= lanes; half /= 2) {
        __syncthreads();  // partial sums written above, or in the round before, are read below
        if (t < half) part[t] += part[t + half];
    }
    if (t < lanes && col < c) {
        const size_t i = (size_t)blockIdx.x * c + col;
        sums[i] = part[t];
        if (rounded) store(rounded + i, (float)part[t]);
    }
}

// to[i] = sum over p of parts[p * len + i], or that much more than it was. Thread = one i, SUM_THREADS a block.
template <class PART>
__device__ __forceinline__ void sum_parts(float* to, const PART* parts, unsigned count, size_t len, bool add) {
    const size_t i = (size_t)blockIdx.x * SUM_THREADS + threadIdx.x;
    if (i >= len) return;
    double sum = 0.0;
    for (unsigned p = 0; p < count; ++p) sum += parts[p * len + i];
    to[i] = add ? to[i] + (float)sum : (float)sum;
}
