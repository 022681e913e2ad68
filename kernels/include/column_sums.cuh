// Column sums of a matrix (rows, c): first over chunks of rows, then over the chunks, both in a fixed order. In f64,
// which costs nothing compared with the memory traffic: gradients of biases and shifts are sums of many numbers of both
// signs and would lose digits in f32.
#pragma once
#include "dtype.cuh"

// Host twin: threads per block that sums columns, or the partial sums of chunks and split-K segments.
constexpr int SUM_THREADS = 256;

// Sums `rows` rows, from row blockIdx.x * rows on, to row blockIdx.x of `sums` and, rounded, of `rounded` unless it is
// null.
//
// Block = SUM_THREADS threads: `lanes` (a power of two up to 32) side by side along the columns, the rest down the
// rows, so that even few columns keep every thread busy. blockIdx.y counts groups of `lanes` columns.
template <class T>
__device__ __forceinline__ void sum_rows(double* sums, T* rounded, const T* x, unsigned rows, size_t all_rows,
                                         unsigned c, unsigned lanes) {
    // 2 KB: one partial sum per thread, halved until one row is left.
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

// to[i] = sum over p of parts[p * len + i], added to to[i] if `add`. Thread = one i; SUM_THREADS threads per block.
template <class PART>
__device__ __forceinline__ void sum_parts(float* to, const PART* parts, unsigned count, size_t len, bool add) {
    const size_t i = (size_t)blockIdx.x * SUM_THREADS + threadIdx.x;
    if (i >= len) return;
    double sum = 0.0;
    for (unsigned p = 0; p < count; ++p) sum += parts[p * len + i];
    to[i] = add ? to[i] + (float)sum : (float)sum;
}
