// The linear layer and its gradients: three matrix products by tiles (tile_gemm.cuh), and the sums of dy's columns.
//
// computes   fwd    y[p,o]  = sum over k of x[p,k] w[o,k] (+ b[o] + residual[p,o])
//            dgrad  dx[p,k] = sum over o of dy[p,o] w[o,k]
//            wgrad  dw[o,k] = sum over p of dy[p,o] x[p,k]; sum_parts adds up its shares
//            bwd_sums  sums of chunks of dy's rows;  bwd_bias  db[o] = sum over p of dy[p,o], from those
// layout     x (rows, c_in), w (c_out, c_in), y, residual, dy (rows, c_out), bias (c_out): contiguous
// mapping    block = 64 threads = one tile of the product; blockIdx.x counts tiles, side by side first. wgrad: blockIdx.y takes `share` rows
// shared     two buffers of both operands, 9 KB (64x64) or 11 KB
// bound by   FMA; by idle rows of the tile where there are few (the time embedding has one for each image); bwd_sums by reading dy
// host       rows, c_in, c_out < 2^31; tensors aligned to 16 bytes (vector accesses where c_in, c_out divide by four)
// numerics   sums in f32, fwd over k, dgrad over o, wgrad over p by shares, the shares in order; the bias in f64. A row's y and dx do not depend on the others.
#include "column_sums.cuh"
#include "tile_gemm.cuh"

// Leaves the tile that begins at (row, col) in y (rows, cols), with bias and residual where they are not null.
template <class TILE, class T>
__device__ __forceinline__ void store_rows(T* y, unsigned row, unsigned rows, unsigned col, unsigned cols, const float* b, const T* residual,
                                           const Results<TILE>& results) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Four four(col + results.col(half), cols);
        if (four.count == 0) return;
        float4 bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (b) bias = four.read(b + four.col);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (row + results.row(i) >= rows) break;
            const size_t at = (size_t)(row + results.row(i)) * cols + four.col;
            float4 v = results.quad(i, half) + bias;
            if (residual) v = v + four.read(residual + at);
            four.write(y + at, v);
        }
    }
}

template <class TILE, class T>
__device__ __forceinline__ void forward(T* y, const T* x, const T* weight, const float* bias, const T* residual, unsigned rows, unsigned c_in,
                                        unsigned c_out) {
    __shared__ __align__(16) TILE tile;
    const unsigned across = (c_out + TILE::COLS - 1) / TILE::COLS;
    const unsigned row = blockIdx.x / across * TILE::ROWS, col = blockIdx.x % across * TILE::COLS;
    Rows<T, TILE::ROWS> a(x, row, rows, c_in);
    Rows<T, TILE::COLS> b(weight, col, c_out, c_in);
    Results<TILE> results;
    multiply(tile, a, b, (c_in + DEPTH - 1) / DEPTH, results);
    store_rows(y, row, rows, col, c_out, bias, residual, results);
}

template <class TILE, class T>
__device__ __forceinline__ void dgrad(T* dx, const T* dy, const T* weight, unsigned rows, unsigned c_in, unsigned c_out) {
    __shared__ __align__(16) TILE tile;
    const unsigned across = (c_in + TILE::COLS - 1) / TILE::COLS;
    const unsigned row = blockIdx.x / across * TILE::ROWS, col = blockIdx.x % across * TILE::COLS;
    Rows<T, TILE::ROWS> a(dy, row, rows, c_out);
    Columns<T, TILE::COLS> b(weight, col, c_in, 0, c_out);
    Results<TILE> results;
    multiply(tile, a, b, (c_out + DEPTH - 1) / DEPTH, results);
    store_rows(dx, row, rows, col, c_in, nullptr, (const T*)nullptr, results);
}

// To `dw` where one share holds all rows, else each share's part to (shares, c_out, c_in).
template <class TILE, class T>
__device__ __forceinline__ void wgrad(float* dw, const T* x, const T* dy, unsigned share, bool add, unsigned rows, unsigned c_in, unsigned c_out) {
    __shared__ __align__(16) TILE tile;
    const unsigned across = (c_in + TILE::COLS - 1) / TILE::COLS;
    const unsigned row = blockIdx.x / across * TILE::ROWS, col = blockIdx.x % across * TILE::COLS;
    const unsigned begin = blockIdx.y * share, end = min(begin + share, rows);
    Columns<T, TILE::ROWS> a(dy, row, c_out, begin, end);
    Columns<T, TILE::COLS> b(x, col, c_in, begin, end);
    Results<TILE> results;
    multiply(tile, a, b, (end - begin + DEPTH - 1) / DEPTH, results);
    store_tile(dw + (size_t)blockIdx.y * c_out * c_in, row, c_out, col, c_in, add, results);
}

// clang-format off
#define ENTRY(suffix, T) \
    extern "C" __global__ void __launch_bounds__(64) linear_fwd_64x64_##suffix(T* y, const T* x, const T* weight, const float* bias, const T* residual, unsigned rows, unsigned c_in, unsigned c_out) { \
        forward<Tile<64, 64>>(y, x, weight, bias, residual, rows, c_in, c_out); \
    } \
    extern "C" __global__ void __launch_bounds__(64) linear_fwd_128x32_##suffix(T* y, const T* x, const T* weight, const float* bias, const T* residual, unsigned rows, unsigned c_in, unsigned c_out) { \
        forward<Tile<128, 32>>(y, x, weight, bias, residual, rows, c_in, c_out); \
    } \
    extern "C" __global__ void __launch_bounds__(64) linear_dgrad_64x64_##suffix(T* dx, const T* dy, const T* weight, unsigned rows, unsigned c_in, unsigned c_out) { \
        dgrad<Tile<64, 64>>(dx, dy, weight, rows, c_in, c_out); \
    } \
    extern "C" __global__ void __launch_bounds__(64) linear_dgrad_128x32_##suffix(T* dx, const T* dy, const T* weight, unsigned rows, unsigned c_in, unsigned c_out) { \
        dgrad<Tile<128, 32>>(dx, dy, weight, rows, c_in, c_out); \
    } \
    extern "C" __global__ void __launch_bounds__(64) linear_wgrad_64x64_##suffix(float* dw, const T* x, const T* dy, unsigned share, unsigned accumulate, unsigned rows, unsigned c_in, unsigned c_out) { \
        wgrad<Tile<64, 64>>(dw, x, dy, share, accumulate, rows, c_in, c_out); \
    } \
    extern "C" __global__ void __launch_bounds__(64) linear_wgrad_32x128_##suffix(float* dw, const T* x, const T* dy, unsigned share, unsigned accumulate, unsigned rows, unsigned c_in, unsigned c_out) { \
        wgrad<Tile<32, 128>>(dw, x, dy, share, accumulate, rows, c_in, c_out); \
    } \
    extern "C" __global__ void __launch_bounds__(256) linear_bwd_sums_##suffix(double* sums, const T* dy, unsigned chunk, size_t rows, unsigned c, unsigned lanes) { \
        sum_rows(sums, (T*)nullptr, dy, chunk, rows, c, lanes); \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
// clang-format on

extern "C" __global__ void __launch_bounds__(256) linear_bwd_bias(float* db, const double* sums, unsigned chunks, size_t c, unsigned accumulate) {
    sum_parts(db, sums, chunks, c, accumulate);
}

extern "C" __global__ void __launch_bounds__(256) linear_sum_parts(float* to, const float* parts, unsigned count, size_t len, unsigned accumulate) {
    sum_parts(to, parts, count, len, accumulate);
}
