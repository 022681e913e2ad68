// Column sums of a matrix (rows, c): first over chunks of rows, then over the chunks, both in a fixed order.
//
// Gradients of biases, shifts and weights are sums of many numbers of both signs and would lose digits in f32. Nor is a
// sum in f64 free: a conversion and an addition per term, of which an RTX 4090 does 645 G a second (1/64 of its f32
// rate), while its memory brings 252 G f32 or 504 G bf16 terms and its L2, which holds most segments of a weight's
// gradient, some 1.2 T: f64 would take 0.8, 1.6 and 4 times as long as the data. So SHORT terms are summed as hi + lo
// in f32, by TwoSum (Knuth; seven additions), and then added in f64.
//
// numerics   hi + lo of SHORT terms errs by at most ((SHORT - 1) 2^-24)^2 = 2^-36 of the sum of their magnitudes
//            (Ogita, Rump and Oishi 2005, Sum2), the f64 sums by 2^-53 per addition: like a sum in f64 once rounded to
//            f32, unless 12 bits cancel. A partial sum beyond the range of f32 becomes NaN
#pragma once
#include "dtype.cuh"

// Host twin: threads per block that sums columns, or the partial sums of chunks and split-K segments.
constexpr int SUM_THREADS = 256;

constexpr unsigned SHORT = 64;

// Host twin: sums that one launch adds up, at most.
constexpr unsigned SUMS = 64;

// Host twin: the sum of parts of `len` elements, of which the next begins `pitch` elements further on.
struct Sum {
    size_t parts;                 // address of the first
    size_t pitch, len;            // elements
    unsigned to, first;           // where the result is in the launch's, in elements; blocks before those of this sum
    unsigned count, lanes;        // parts, elements per block
    unsigned add, wide;           // 1: added to what is there; 1: the parts are f64
};

// Host twin: the sums of a launch, which are many small ones: one launch each would be most of their time.
struct Sums {
    Sum sums[SUMS];
    unsigned count, unused;
};

// hi + lo += term: lo takes what hi loses by rounding.
__device__ __forceinline__ void add_term(float& hi, float& lo, float term) {
    const float sum = hi + term, added = sum - hi;
    lo += (hi - (sum - added)) + (term - added);
    hi = sum;
}

// x[0] + x[stride] + ... + x[(terms - 1) stride], in order.
template <class T>
__device__ __forceinline__ double sum_terms(const T* x, unsigned terms, size_t stride) {
    double total = 0.0;
    while (terms > 0) {
        const unsigned count = min(terms, SHORT);
        float hi = 0.0f, lo = 0.0f;
#pragma unroll 4
        for (unsigned k = 0; k < count; ++k, x += stride) add_term(hi, lo, load(x));
        total += double(hi) + double(lo);
        terms -= count;
    }
    return total;
}

// The same for sums of sums.
__device__ __forceinline__ double sum_terms(const double* x, unsigned terms, size_t stride) {
    double total = 0.0;
#pragma unroll 4
    for (unsigned k = 0; k < terms; ++k, x += stride) total += *x;
    return total;
}

// The sum of `rows` rows of column `col` (of c) of x, for threads t < lanes, each its own column; the others get a
// part. Block = SUM_THREADS threads: `lanes` (a power of two) side by side along the columns, the rest down the rows,
// so that even few columns keep every thread busy. All threads call it, once.
template <class T>
__device__ __forceinline__ double sum_column(const T* x, unsigned rows, size_t c, size_t col, unsigned lanes) {
    // 2 KB: one partial sum per thread, halved until one row is left. Each thread writes its own.
    __shared__ double part[SUM_THREADS];
    const unsigned t = threadIdx.x, row = t / lanes, step = SUM_THREADS / lanes;
    const unsigned terms = col < c && row < rows ? (rows - row - 1) / step + 1 : 0;
    part[t] = sum_terms(x + row * c + col, terms, step * c);
    for (unsigned half = SUM_THREADS / 2; half >= lanes; half /= 2) {
        __syncthreads();  // partial sums written above, or in the round before, are read below
        if (t < half) part[t] += part[t + half];
    }
    return part[t];
}

// Sums `rows` rows, from row blockIdx.x * rows on, to row blockIdx.x of `sums` and, rounded, of `rounded` unless it is
// null. blockIdx.y counts groups of `lanes` (up to 32) columns.
template <class T>
__device__ __forceinline__ void sum_rows(double* sums, T* rounded, const T* x, unsigned rows, size_t all_rows,
                                         unsigned c, unsigned lanes) {
    const unsigned col = blockIdx.y * lanes + threadIdx.x % lanes;
    const size_t first = (size_t)blockIdx.x * rows;
    const double sum = sum_column(x + first * c, (unsigned)min((size_t)rows, all_rows - first), c, col, lanes);
    if (threadIdx.x < lanes && col < c) {
        const size_t i = (size_t)blockIdx.x * c + col;
        sums[i] = sum;
        if (rounded) store(rounded + i, (float)sum);
    }
}

// Which of `count` (up to MOST, a power of two) rows is the last with first <= at; first grows and begins with 0.
template <unsigned MOST, class ROW>
__device__ __forceinline__ unsigned last_from(const ROW (&rows)[MOST], unsigned count, unsigned at) {
    unsigned which = 0;
#pragma unroll
    for (unsigned step = MOST / 2; step > 0; step /= 2) {
        if (which + step < count && rows[which + step].first <= at) which += step;
    }
    return which;
}

// result[i] = sum over p of parts[p * pitch + i], added to result[i] if so. Block `block` = `lanes` of the i; see
// part_lanes in src/device/cuda/tile.rs.
template <class PART>
__device__ __forceinline__ void sum_parts(float* result, const PART* parts, const Sum& s, unsigned block) {
    const size_t i = (size_t)block * s.lanes + threadIdx.x % s.lanes;
    // What is beyond the end has no parts.
    const double sum = sum_column(parts, s.count, s.pitch, i < s.len ? i : s.pitch, s.lanes);
    if (threadIdx.x < s.lanes && i < s.len) result[i] = s.add ? result[i] + (float)sum : (float)sum;
}
