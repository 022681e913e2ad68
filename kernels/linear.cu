// linear: the layer and its gradients, as three tiled matrix products (tile_gemm.cuh) and the column sums of dy.
//
// computes   fwd    y[p,o]  = sum over k of x[p,k] w[o,k] (+ b[o] + residual[p,o])
//            dgrad  dx[p,k] = sum over o of dy[p,o] w[o,k]
//            wgrad  dw[o,k] = sum over p of dy[p,o] x[p,k], by split-K; sum_parts adds up the segments
//            bwd_sums  sums of chunks of dy's rows;  bwd_bias  db[o] = sum over p of dy[p,o], from those
// layout     x (rows, c_in), w (c_out, c_in), y, residual, dy (rows, c_out), bias (c_out): contiguous
// mapping    block = 64 threads = one tile of the product; blockIdx.x counts tiles, along the columns first.
//            wgrad: blockIdx.y is one split-K segment of the rows
// shared     two buffers of both operands, 9 KB (64x64) or 11 KB
// bound by   as tile_gemm.cuh says; idle rows of the tile if there are few (the time embedding has one per image);
//            bwd_sums: reading dy
// host       rows, c_in, c_out < 2^30; tensors aligned to 16 bytes (vector accesses where c_in, c_out divide by four)
// numerics   sums in f32: fwd over k, dgrad over o, wgrad over the rows of a segment; the segments and the bias as
//            column_sums.cuh says. A row's y and dx do not depend on the other rows.
#include "column_sums.cuh"
#include "tile_gemm.cuh"

// Host twin: the sizes of a linear layer; rows are pixels or tokens.
struct Sizes {
    unsigned rows, c_in, c_out;
};

// Host twin: rows per block of bwd_sums, 64 per thread with 32 lanes across the columns.
constexpr int CHUNK = 512;

// Stores the tile that begins at (row, col) to y (rows, cols), plus bias and residual unless they are null.
template <class TILE, class T>
__device__ __forceinline__ void store_rows(T* y, unsigned row, unsigned rows, unsigned col, unsigned cols,
                                           const float* b, const T* residual, const Accumulators<TILE>& acc) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Four four(col + acc.col(half), cols);
        if (four.count == 0) return;
        float4 bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (b) bias = four.read(b + four.col);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (row + acc.row(i) >= rows) break;
            const size_t offset = (size_t)(row + acc.row(i)) * cols + four.col;
            float4 v = acc.quad(i, half) + bias;
            if (residual) v = v + four.read(residual + offset);
            four.write(y + offset, v);
        }
    }
}

template <class TILE, class T>
__device__ __forceinline__ void forward(T* y, const T* x, const T* weight, const float* bias, const T* residual,
                                        const Sizes& s) {
    __shared__ __align__(16) TILE tile;
    const unsigned across = (s.c_out + TILE::BN - 1) / TILE::BN;
    const unsigned row = blockIdx.x / across * TILE::BM, col = blockIdx.x % across * TILE::BN;
    Rows<T, TILE::BM> a(x, row, s.rows, s.c_in);
    Rows<T, TILE::BN> b(weight, col, s.c_out, s.c_in);
    Accumulators<TILE> acc;
    multiply(tile, a, b, (s.c_in + BK - 1) / BK, acc);
    store_rows(y, row, s.rows, col, s.c_out, bias, residual, acc);
}

template <class TILE, class T>
__device__ __forceinline__ void dgrad(T* dx, const T* dy, const T* weight, const Sizes& s) {
    __shared__ __align__(16) TILE tile;
    const unsigned across = (s.c_in + TILE::BN - 1) / TILE::BN;
    const unsigned row = blockIdx.x / across * TILE::BM, col = blockIdx.x % across * TILE::BN;
    Rows<T, TILE::BM> a(dy, row, s.rows, s.c_out);
    Columns<T, TILE::BN> b(weight, col, s.c_in, 0, s.c_out);
    Accumulators<TILE> acc;
    multiply(tile, a, b, (s.c_out + BK - 1) / BK, acc);
    store_rows(dx, row, s.rows, col, s.c_in, nullptr, (const T*)nullptr, acc);
}

// Writes `dw` if one segment has all rows, otherwise each segment's partial sums to (segments, c_out, c_in).
template <class TILE, class T>
__device__ __forceinline__ void wgrad(float* dw, const T* x, const T* dy, const Sizes& s, unsigned segment, bool add) {
    __shared__ __align__(16) TILE tile;
    const unsigned across = (s.c_in + TILE::BN - 1) / TILE::BN;
    const unsigned row = blockIdx.x / across * TILE::BM, col = blockIdx.x % across * TILE::BN;
    const unsigned begin = blockIdx.y * segment, end = min(begin + segment, s.rows);
    Columns<T, TILE::BM> a(dy, row, s.c_out, begin, end);
    Columns<T, TILE::BN> b(x, col, s.c_in, begin, end);
    Accumulators<TILE> acc;
    multiply(tile, a, b, (end - begin + BK - 1) / BK, acc);
    store_tile(dw + (size_t)blockIdx.y * s.c_out * s.c_in, row, s.c_out, col, s.c_in, add, acc);
}

// Entries, each in f32 and bf16, named after their tile BM x BN:
//   linear_fwd_64x64    linear_dgrad_64x64    linear_wgrad_64x64     square: least traffic per result
//   linear_fwd_128x32   linear_dgrad_128x32                          for few columns: channels
//   linear_wgrad_32x128                                              for few rows: channels of y
//   linear_bwd_sums
#define ENTRIES(suffix, T) \
    extern "C" __global__ void __launch_bounds__(THREADS) linear_fwd_64x64_##suffix( \
        T* y, const T* x, const T* weight, const float* bias, const T* residual, Sizes s) { \
        forward<Tile<64, 64>>(y, x, weight, bias, residual, s); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS) linear_fwd_128x32_##suffix( \
        T* y, const T* x, const T* weight, const float* bias, const T* residual, Sizes s) { \
        forward<Tile<128, 32>>(y, x, weight, bias, residual, s); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS) linear_dgrad_64x64_##suffix( \
        T* dx, const T* dy, const T* weight, Sizes s) { \
        dgrad<Tile<64, 64>>(dx, dy, weight, s); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS) linear_dgrad_128x32_##suffix( \
        T* dx, const T* dy, const T* weight, Sizes s) { \
        dgrad<Tile<128, 32>>(dx, dy, weight, s); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS) linear_wgrad_64x64_##suffix( \
        float* dw, const T* x, const T* dy, Sizes s, unsigned segment, unsigned accumulate) { \
        wgrad<Tile<64, 64>>(dw, x, dy, s, segment, accumulate); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS) linear_wgrad_32x128_##suffix( \
        float* dw, const T* x, const T* dy, Sizes s, unsigned segment, unsigned accumulate) { \
        wgrad<Tile<32, 128>>(dw, x, dy, s, segment, accumulate); \
    } \
    extern "C" __global__ void __launch_bounds__(SUM_THREADS) linear_bwd_sums_##suffix( \
        double* sums, const T* dy, size_t rows, unsigned c, unsigned lanes) { \
        sum_rows(sums, (T*)nullptr, dy, CHUNK, rows, c, lanes); \
    }
F32_AND_BF16(ENTRIES)
#undef ENTRIES

extern "C" __global__ void __launch_bounds__(SUM_THREADS) linear_bwd_bias(
    float* db, const double* sums, unsigned chunks, size_t c, unsigned accumulate, unsigned lanes) {
    sum_parts(db, sums, chunks, c, accumulate, lanes);
}

extern "C" __global__ void __launch_bounds__(SUM_THREADS) linear_sum_parts(
    float* to, const float* parts, unsigned count, size_t len, unsigned accumulate, unsigned lanes) {
    sum_parts(to, parts, count, len, accumulate, lanes);
}
