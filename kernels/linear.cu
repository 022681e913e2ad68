// linear: the layer and its gradients, as three tiled matrix products and the column sums of dy. The products run on
// FMAs in f32 (tile_gemm.cuh) and on tensor cores in tf32 (the same) and bf16 (tile_mma.cuh). What is said of f32 holds
// for tf32 but for what multiplies.
//
// computes   fwd    y[p,o]  = sum over k of x[p,k] w[o,k] (+ b[o] + residual[p,o]); in bf16 also silu(y) of the
//                   rounded y, or that alone
//            dgrad  dx[p,k] = sum over o of dy[p,o] w[o,k]
//            wgrad  dw[o,k] = sum over p of dy[p,o] x[p,k], by split-K; add_parts adds up the segments
//            bwd    in bf16 both in one launch, and sums of dy over the rows of a segment, of which add_parts makes
//                   db[o] = sum over p of dy[p,o]
//            bwd_sums  in f32 sums of chunks of dy's rows for db
// layout     x (rows, c_in), w (c_out, c_in), y, residual, dy (rows, c_out), bias (c_out): contiguous
//            group  in bf16 the layers that read the same x, each y of its own: one product of x and of all weights
//                   (fwd, wgrad), and one sum over the channels of all dy (dgrad). Where each layer's tensors are is in
//                   a table among the arguments (Layers)
// mapping    block = one tile of the product; blockIdx.x counts tiles, along the columns first. wgrad: blockIdx.y is
//            one split-K segment of the rows. bwd: blockIdx.x counts everything, dw first (BackwardBlocks); of a group,
//            the segments of dx are of layers, and group_join adds them up
// shared     f32: two buffers of both operands, 9 KB (64x64) or 11 KB. bf16: the ring, 96 KB (128x128) or 48 KB (64x64)
// bound by   memory, in bf16 with up to 512 channels; else as tile_gemm.cuh and tile_mma.cuh say; idle rows of the tile
//            if there are few (the time embedding has one per image); bwd_sums: reading dy
// host       rows, c_in, c_out < 2^30; tensors aligned to 16 bytes (f32: vector accesses where c_in, c_out divide by
//            four; bf16: kernels by what divides them, as the entries say, and the ring as dynamic shared memory)
// numerics   sums in f32: fwd over k, dgrad over o (of a group: of one layer after the other, and by segments of layers
//            if an image is one row), wgrad over the rows of a segment; in tf32 eight steps at a time, of operands
//            rounded to 10 bits of fraction; the segments and the bias as column_sums.cuh says. A row's y and dx do
//            not depend on the other rows.
#include "activation.cuh"
#include "column_sums.cuh"
#include "tile_gemm.cuh"
#include "tile_mma.cuh"

// Host twin: the sizes of a linear layer; rows are pixels or tokens.
struct Sizes {
    unsigned rows, c_in, c_out;
};

// Host twin: rows per block of bwd_sums, 64 per thread with 32 lanes across the columns.
constexpr int CHUNK = 512;

// Host twin: layers of a group that a launch takes, at most.
constexpr unsigned LAYERS = 32;

// Host twin: a layer of a group.
struct Layer {
    size_t y;               // address of y or dy
    unsigned weight, bias;  // where they and their gradients are in the launch's, in elements
    unsigned c_out, first;  // channels of y; tiles along them before its own
};

// Host twin: layers with the same x.
struct Layers {
    Layer layers[LAYERS];
    unsigned rows, c_in, total, count;  // tiles along c_out of all layers, and layers
};

// The layer of the tile number `at` along the channels of all.
__device__ __forceinline__ const Layer& layer_at(const Layers& all, unsigned at) {
    return all.layers[last_from<LAYERS>(all.layers, all.count, at)];
}

// Stores the tile that begins at (row, col) to y (rows, cols), plus bias and residual unless they are null.
template <class TILE, Math MATH>
__device__ __forceinline__ void store_rows(float* y, unsigned row, unsigned rows, unsigned col, unsigned cols,
                                           const float* b, const float* residual, const Accumulators<TILE, MATH>& acc) {
#pragma unroll
    for (int q = 0; q < acc.ACROSS; ++q) {
        const Four four(col + acc.col(q), cols);
        if (four.count == 0) return;
        float4 bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (b) bias = four.read(b + four.col);
#pragma unroll
        for (int i = 0; i < acc.ROWS; ++i) {
            if (row + acc.row(i) >= rows) break;
            const size_t offset = (size_t)(row + acc.row(i)) * cols + four.col;
            float4 v = acc.quad(i, q) + bias;
            if (residual) v = v + four.read(residual + offset);
            four.write(y + offset, v);
        }
    }
}

template <class TILE, Math MATH>
__device__ __forceinline__ void forward(float* y, const float* x, const float* weight, const float* bias,
                                        const float* residual, const Sizes& s) {
    __shared__ __align__(16) TILE tile;
    const unsigned across = (s.c_out + TILE::BN - 1) / TILE::BN;
    const unsigned row = blockIdx.x / across * TILE::BM, col = blockIdx.x % across * TILE::BN;
    Rows<TILE::BM> a(x, row, s.rows, s.c_in);
    Rows<TILE::BN> b(weight, col, s.c_out, s.c_in);
    Accumulators<TILE, MATH> acc;
    multiply(tile, a, b, (s.c_in + BK - 1) / BK, acc);
    store_rows(y, row, s.rows, col, s.c_out, bias, residual, acc);
}

template <class TILE, Math MATH>
__device__ __forceinline__ void dgrad(float* dx, const float* dy, const float* weight, const Sizes& s) {
    __shared__ __align__(16) TILE tile;
    const unsigned across = (s.c_in + TILE::BN - 1) / TILE::BN;
    const unsigned row = blockIdx.x / across * TILE::BM, col = blockIdx.x % across * TILE::BN;
    Rows<TILE::BM> a(dy, row, s.rows, s.c_out);
    Columns<TILE::BN> b(weight, col, s.c_in, 0, s.c_out);
    Accumulators<TILE, MATH> acc;
    multiply(tile, a, b, (s.c_out + BK - 1) / BK, acc);
    store_rows(dx, row, s.rows, col, s.c_in, nullptr, nullptr, acc);
}

// Writes `dw` if one segment has all rows, otherwise each segment's partial sums to (segments, c_out, c_in).
template <class TILE, Math MATH>
__device__ __forceinline__ void wgrad(float* dw, const float* x, const float* dy, const Sizes& s, unsigned segment,
                                      bool add) {
    __shared__ __align__(16) TILE tile;
    const unsigned across = (s.c_in + TILE::BN - 1) / TILE::BN;
    const unsigned row = blockIdx.x / across * TILE::BM, col = blockIdx.x % across * TILE::BN;
    const unsigned begin = blockIdx.y * segment, end = min(begin + segment, s.rows);
    Columns<TILE::BM> a(dy, row, s.c_out, begin, end);
    Columns<TILE::BN> b(x, col, s.c_in, begin, end);
    Accumulators<TILE, MATH> acc;
    multiply(tile, a, b, (end - begin + BK - 1) / BK, acc);
    store_tile(dw + (size_t)blockIdx.y * s.c_out * s.c_in, row, s.c_out, col, s.c_in, add, acc);
}

namespace mma {

// a = rows of x, b = rows of the weight; a slab is the next BK columns of both.
template <class TILE, Unit UNIT>
struct ForwardOperands {
    static constexpr bool A_ALONG_K = true, B_ALONG_K = true, WRITTEN_OUT = UNIT == Unit::BLOCK;
    AlongK<TILE::THREADS, TILE::BM, UNIT> a;
    AlongK<TILE::THREADS, TILE::BN, UNIT> b;
    int k, left;

    __device__ ForwardOperands(const bf16* x, const bf16* weight, unsigned row, unsigned col, const Sizes& s)
        : a(0, x, row, s.rows, s.c_in), b(TILE::A_BYTES, weight, col, s.c_out, s.c_in), k(0), left((int)s.c_in) {}

    __device__ __forceinline__ void bring(uint32_t slot) {
        a.bring(slot, k, left);
        b.bring(slot, k, left);
        k += BK;
        left -= BK;
    }
};

// a = rows of dy, b = the weight; a slab is the next BK columns of dy and rows of the weight.
template <class TILE, Unit UNIT>
struct DgradOperands {
    static constexpr bool A_ALONG_K = true, B_ALONG_K = false, WRITTEN_OUT = UNIT == Unit::BLOCK;
    AlongK<TILE::THREADS, TILE::BM, UNIT> a;
    AcrossK<TILE::THREADS, TILE::BN, UNIT, UNIT == Unit::BLOCK> b;
    int k, left;
    unsigned c_in;

    __device__ DgradOperands(const bf16* dy, const bf16* weight, unsigned row, unsigned col, const Sizes& s)
        : a(0, dy, row, s.rows, s.c_out),
          b(TILE::A_BYTES, weight, col, s.c_in, s.c_in),
          k(0),
          left((int)s.c_out),
          c_in(s.c_in) {}

    __device__ __forceinline__ void bring(uint32_t slot) {
        a.bring(slot, k, left);
        b.bring(slot, 0, left);
        b.advance((size_t)BK * c_in);
        k += BK;
        left -= BK;
    }
};

// a = dy, b = x; a slab is the next BK rows of both.
template <class TILE, Unit UNIT>
struct WgradOperands {
    static constexpr bool A_ALONG_K = false, B_ALONG_K = false, WRITTEN_OUT = false;
    AcrossK<TILE::THREADS, TILE::BM, UNIT, false> a;
    AcrossK<TILE::THREADS, TILE::BN, UNIT, false> b;
    int left;
    unsigned c_out, c_in;

    // For rows begin .. end.
    __device__ WgradOperands(const bf16* dy, const bf16* x, unsigned row, unsigned col, const Sizes& s, unsigned begin,
                             unsigned end)
        : a(0, dy + (size_t)begin * s.c_out, row, s.c_out, s.c_out),
          b(TILE::A_BYTES, x + (size_t)begin * s.c_in, col, s.c_in, s.c_in),
          left((int)(end - begin)),
          c_out(s.c_out),
          c_in(s.c_in) {}

    __device__ __forceinline__ void bring(uint32_t slot) {
        a.bring(slot, 0, left);
        b.bring(slot, 0, left);
        a.advance((size_t)BK * c_out);
        b.advance((size_t)BK * c_in);
        left -= BK;
    }
};

__device__ __forceinline__ float silu_of_rounded(float v) { return silu(__bfloat162float(__float2bfloat16_rn(v))); }

// Stores the tile that begins at (row, col) to y (rows, cols), plus bias and residual unless they are null, and what
// the SiLU makes of it to `activated`; to neither if it is null.
template <class TILE>
__device__ __forceinline__ void store_rows(bf16* y, bf16* activated, unsigned char* ring, unsigned row, unsigned rows,
                                           unsigned col, unsigned cols, const float* bias, const bf16* residual,
                                           const Accumulators<TILE>& acc) {
    each_four(reinterpret_cast<float*>(ring), acc, [&](int r, int c, float4 v) {
        const Four four(col + c, cols);
        if (four.count == 0 || row + r >= rows) return;
        const size_t offset = (size_t)(row + r) * cols + four.col;
        if (bias) v = v + four.read(bias + four.col);
        if (residual) v = v + four.read(residual + offset);
        if (y) four.write(y + offset, v);
        if (activated) {
            v = make_float4(silu_of_rounded(v.x), silu_of_rounded(v.y), silu_of_rounded(v.z), silu_of_rounded(v.w));
            four.write(activated + offset, v);
        }
    });
}

template <class TILE, Unit UNIT>
__device__ __forceinline__ void forward(bf16* y, bf16* activated, const bf16* x, const bf16* weight, const float* bias,
                                        const bf16* residual, const Sizes& s, unsigned row, unsigned col) {
    extern __shared__ __align__(1024) unsigned char ring[];
    ForwardOperands<TILE, UNIT> operands(x, weight, row, col, s);
    Accumulators<TILE> acc;
    multiply(shared_address(ring), operands, (s.c_in + BK - 1) / BK, steps_of<UNIT>(s.c_in), acc, 0, [] {});
    store_rows(y, activated, ring, row, s.rows, col, s.c_out, bias, residual, acc);
}

template <class TILE, Unit UNIT>
__device__ __forceinline__ void forward(bf16* y, bf16* activated, const bf16* x, const bf16* weight, const float* bias,
                                        const bf16* residual, const Sizes& s) {
    const unsigned across = (s.c_out + TILE::BN - 1) / TILE::BN;
    const unsigned row = blockIdx.x / across * TILE::BM, col = blockIdx.x % across * TILE::BN;
    forward<TILE, UNIT>(y, activated, x, weight, bias, residual, s, row, col);
}

// The tiles of all layers lie side by side, so that blocks that run together read the same rows of x.
template <class TILE, Unit UNIT>
__device__ __forceinline__ void group_forward(const bf16* x, const bf16* weights, const float* biases,
                                              const Layers& all) {
    const unsigned row = blockIdx.x / all.total * TILE::BM, tile = blockIdx.x % all.total;
    const Layer& of = layer_at(all, tile);
    forward<TILE, UNIT>(reinterpret_cast<bf16*>(of.y), nullptr, x, weights + of.weight, biases + of.bias, nullptr,
                        {all.rows, all.c_in, of.c_out}, row, (tile - of.first) * TILE::BN);
}

template <class TILE, Unit UNIT>
__device__ __forceinline__ void dgrad(bf16* dx, const bf16* dy, const bf16* weight, const Sizes& s, unsigned tile) {
    extern __shared__ __align__(1024) unsigned char ring[];
    const unsigned across = (s.c_in + TILE::BN - 1) / TILE::BN;
    const unsigned row = tile / across * TILE::BM, col = tile % across * TILE::BN;
    DgradOperands<TILE, UNIT> operands(dy, weight, row, col, s);
    Accumulators<TILE> acc;
    multiply(shared_address(ring), operands, (s.c_out + BK - 1) / BK, steps_of<UNIT>(s.c_out), acc, 0, [] {});
    store_rows(dx, nullptr, ring, row, s.rows, col, s.c_in, nullptr, nullptr, acc);
}

// a = rows of dy of the layers from `layer` to `end`, one after the other, b = their weights.
template <class TILE, Unit UNIT>
struct GroupOperands {
    static constexpr bool A_ALONG_K = true, B_ALONG_K = false, WRITTEN_OUT = UNIT == Unit::BLOCK;
    const Layers& all;
    const bf16* weights;
    unsigned layer, end, row, col;
    AlongK<TILE::THREADS, TILE::BM, UNIT> a;
    AcrossK<TILE::THREADS, TILE::BN, UNIT, UNIT == Unit::BLOCK> b;
    int k, left;

    __device__ GroupOperands(const Layers& all_, const bf16* weights_, unsigned row_, unsigned col_, unsigned layer_,
                             unsigned end_)
        : all(all_),
          weights(weights_),
          layer(layer_),
          end(end_),
          row(row_),
          col(col_),
          a(0, dy(), row, all.rows, all.layers[layer].c_out),
          b(TILE::A_BYTES, weights + all.layers[layer].weight, col, all.c_in, all.c_in),
          k(0),
          left((int)all.layers[layer].c_out) {}

    __device__ __forceinline__ const bf16* dy() const { return reinterpret_cast<const bf16*>(all.layers[layer].y); }

    __device__ __forceinline__ void bring(uint32_t slot) {
        a.bring(slot, k, left);
        b.bring(slot, 0, left);
        k += BK;
        left -= BK;
        if (left > 0) {
            b.advance((size_t)BK * all.c_in);
        } else if (++layer < end) {
            const Layer& of = all.layers[layer];
            k = 0;
            left = (int)of.c_out;
            const AlongK<TILE::THREADS, TILE::BM, UNIT> next_a(0, dy(), row, all.rows, of.c_out);
            const AcrossK<TILE::THREADS, TILE::BN, UNIT, UNIT == Unit::BLOCK> next_b(
                TILE::A_BYTES, weights + of.weight, col, all.c_in, all.c_in);
            // Their places in the slot stay.
#pragma unroll
            for (int i = 0; i < decltype(next_a)::P::PASSES; ++i) a.row[i] = next_a.row[i];
#pragma unroll
            for (int i = 0; i < decltype(next_b)::P::PASSES; ++i) b.row[i] = next_b.row[i];
        }
    }
};

// Writes `dx` if one segment has all layers, otherwise the sums of each segment of `depth` layers to `parts` (segments,
// rows, c_in).
template <class TILE, Unit UNIT>
__device__ __forceinline__ void group_dgrad(bf16* dx, float* parts, const bf16* weights, const Layers& all,
                                            unsigned tile, unsigned segment, unsigned depth) {
    extern __shared__ __align__(1024) unsigned char ring[];
    const unsigned across = (all.c_in + TILE::BN - 1) / TILE::BN;
    const unsigned row = tile / across * TILE::BM, col = tile % across * TILE::BN;
    const unsigned first = segment * depth, end = min(first + depth, all.count);
    unsigned slabs = 0;
    for (unsigned layer = first; layer < end; ++layer) slabs += (all.layers[layer].c_out + BK - 1) / BK;
    GroupOperands<TILE, UNIT> operands(all, weights, row, col, first, end);
    Accumulators<TILE> acc;
    multiply(shared_address(ring), operands, slabs, BK / 16, acc, 0, [] {});
    if (parts) {
        store_tile(parts + (size_t)segment * all.rows * all.c_in, ring, row, all.rows, col, all.c_in, false, acc);
    } else {
        store_rows(dx, nullptr, ring, row, all.rows, col, all.c_in, nullptr, nullptr, acc);
    }
}

// Writes the sums over rows begin .. end to `to` (c_out, c_in), or adds them; and unless `sums` is null, those of dy to
// it (c_out).
template <class TILE, Unit UNIT>
__device__ __forceinline__ void wgrad(float* to, double* sums, const bf16* x, const bf16* dy, const Sizes& s,
                                      unsigned begin, unsigned end, bool add, unsigned row, unsigned col) {
    extern __shared__ __align__(1024) unsigned char ring[];
    WgradOperands<TILE, UNIT> operands(dy, x, row, col, s, begin, end);
    Accumulators<TILE> acc;
    ColumnSum<TILE> of_dy;
    const bool summing = sums && col == 0;
    multiply(shared_address(ring), operands, (end - begin + BK - 1) / BK, BK / 16, acc, 0, [] {}, [&](uint32_t slot) {
        if (summing) of_dy.add(slot);
    });
    if (summing) of_dy.store(sums, row, s.c_out);
    store_tile(to, ring, row, s.c_out, col, s.c_in, add, acc);
}

// Writes segment number `segment`, of `depth` rows, to its part of dw (segments, c_out, c_in), or adds it, and to its
// part of sums (segments, c_out).
template <class TILE, Unit UNIT>
__device__ __forceinline__ void wgrad(float* dw, double* sums, const bf16* x, const bf16* dy, const Sizes& s,
                                      unsigned tile, unsigned segment, unsigned depth, bool add) {
    const unsigned across = (s.c_in + TILE::BN - 1) / TILE::BN, begin = segment * depth;
    wgrad<TILE, UNIT>(dw + (size_t)segment * s.c_out * s.c_in, sums ? sums + (size_t)segment * s.c_out : nullptr, x, dy,
                      s, begin, min(begin + depth, s.rows), add, tile / across * TILE::BM, tile % across * TILE::BN);
}

// The same for all layers, whose parts lie one behind the other, in whole tiles along c_out.
template <class TILE, Unit UNIT>
__device__ __forceinline__ void group_wgrad(float* dw, double* sums, const bf16* x, const Layers& all, unsigned tile,
                                            unsigned segment, unsigned depth) {
    const unsigned across = (all.c_in + TILE::BN - 1) / TILE::BN, row = tile / across, begin = segment * depth;
    const Layer& of = layer_at(all, row);
    const size_t part = ((size_t)segment * all.total + of.first) * TILE::BM;
    wgrad<TILE, UNIT>(dw + part * all.c_in, sums ? sums + part : nullptr, x, reinterpret_cast<const bf16*>(of.y),
                      {all.rows, all.c_in, of.c_out}, begin, min(begin + depth, all.rows), false,
                      (row - of.first) * TILE::BM, tile % across * TILE::BN);
}

// One launch for both gradients.
template <class DX, Unit UNIT_DX, class DW, Unit UNIT_DW>
__device__ __forceinline__ void backward(float* dw, double* sums, bf16* dx, const bf16* x, const bf16* dy,
                                         const bf16* weight, const Sizes& s, const BackwardBlocks& b) {
    static_assert(DX::THREADS == DW::THREADS, "blocks of one launch");
    const unsigned of_dw = b.dw_tiles * b.dw_segments;
    if (blockIdx.x < of_dw) {
        wgrad<DW, UNIT_DW>(dw, sums, x, dy, s, blockIdx.x % b.dw_tiles, blockIdx.x / b.dw_tiles, b.dw_depth, false);
    } else {
        dgrad<DX, UNIT_DX>(dx, dy, weight, s, blockIdx.x - of_dw);
    }
}

template <class DX, Unit UNIT_DX, class DW, Unit UNIT_DW>
__device__ __forceinline__ void group_backward(float* dw, double* sums, bf16* dx, float* parts, const bf16* x,
                                               const bf16* weights, const Layers& all, const BackwardBlocks& b) {
    static_assert(DX::THREADS == DW::THREADS, "blocks of one launch");
    const unsigned of_dw = b.dw_tiles * b.dw_segments, block = blockIdx.x - of_dw;
    if (blockIdx.x < of_dw) {
        group_wgrad<DW, UNIT_DW>(dw, sums, x, all, blockIdx.x % b.dw_tiles, blockIdx.x / b.dw_tiles, b.dw_depth);
    } else {
        group_dgrad<DX, UNIT_DX>(dx, parts, weights, all, block % b.dx_tiles, block / b.dx_tiles, b.dx_depth);
    }
}

}  // namespace mma

// Entries in f32, named after their tile BM x BN:
//   linear_fwd_64x64    linear_dgrad_64x64    linear_wgrad_64x64     square: least traffic per result
//   linear_fwd_128x32   linear_dgrad_128x32                          for few columns: channels
//   linear_wgrad_32x128                                              for few rows: channels of y
extern "C" __global__ void __launch_bounds__(THREADS) linear_fwd_64x64_f32(
    float* y, const float* x, const float* weight, const float* bias, const float* residual, Sizes s) {
    forward<Tile<64, 64>, Math::FMA>(y, x, weight, bias, residual, s);
}

extern "C" __global__ void __launch_bounds__(THREADS) linear_fwd_128x32_f32(
    float* y, const float* x, const float* weight, const float* bias, const float* residual, Sizes s) {
    forward<Tile<128, 32>, Math::FMA>(y, x, weight, bias, residual, s);
}

extern "C" __global__ void __launch_bounds__(THREADS) linear_dgrad_64x64_f32(
    float* dx, const float* dy, const float* weight, Sizes s) {
    dgrad<Tile<64, 64>, Math::FMA>(dx, dy, weight, s);
}

extern "C" __global__ void __launch_bounds__(THREADS) linear_dgrad_128x32_f32(
    float* dx, const float* dy, const float* weight, Sizes s) {
    dgrad<Tile<128, 32>, Math::FMA>(dx, dy, weight, s);
}

extern "C" __global__ void __launch_bounds__(THREADS) linear_wgrad_64x64_f32(
    float* dw, const float* x, const float* dy, Sizes s, unsigned segment, unsigned accumulate) {
    wgrad<Tile<64, 64>, Math::FMA>(dw, x, dy, s, segment, accumulate);
}

extern "C" __global__ void __launch_bounds__(THREADS) linear_wgrad_32x128_f32(
    float* dw, const float* x, const float* dy, Sizes s, unsigned segment, unsigned accumulate) {
    wgrad<Tile<32, 128>, Math::FMA>(dw, x, dy, s, segment, accumulate);
}

// Entries in tf32, on tensor cores, with the same tiles.
extern "C" __global__ void __launch_bounds__(THREADS) linear_fwd_64x64_tf32(
    float* y, const float* x, const float* weight, const float* bias, const float* residual, Sizes s) {
    forward<Tile<64, 64>, Math::TF32>(y, x, weight, bias, residual, s);
}

extern "C" __global__ void __launch_bounds__(THREADS) linear_fwd_128x32_tf32(
    float* y, const float* x, const float* weight, const float* bias, const float* residual, Sizes s) {
    forward<Tile<128, 32>, Math::TF32>(y, x, weight, bias, residual, s);
}

extern "C" __global__ void __launch_bounds__(THREADS) linear_dgrad_64x64_tf32(
    float* dx, const float* dy, const float* weight, Sizes s) {
    dgrad<Tile<64, 64>, Math::TF32>(dx, dy, weight, s);
}

extern "C" __global__ void __launch_bounds__(THREADS) linear_dgrad_128x32_tf32(
    float* dx, const float* dy, const float* weight, Sizes s) {
    dgrad<Tile<128, 32>, Math::TF32>(dx, dy, weight, s);
}

extern "C" __global__ void __launch_bounds__(THREADS) linear_wgrad_64x64_tf32(
    float* dw, const float* x, const float* dy, Sizes s, unsigned segment, unsigned accumulate) {
    wgrad<Tile<64, 64>, Math::TF32>(dw, x, dy, s, segment, accumulate);
}

extern "C" __global__ void __launch_bounds__(THREADS) linear_wgrad_32x128_tf32(
    float* dw, const float* x, const float* dy, Sizes s, unsigned segment, unsigned accumulate) {
    wgrad<Tile<32, 128>, Math::TF32>(dw, x, dy, s, segment, accumulate);
}

// Entries in bf16, on tensor cores, and what must divide the channels:
//   linear_fwd_mma_128x128            c_in by 64
//   linear_fwd_mma_64x64              c_in by 8
//   linear_fwd_mma_64x64_any          nothing
//   linear_bwd_mma_128x128            both by 128; for dx alone c_out by 64
//   linear_bwd_mma_64x64_128x128      both by 128; tiles of dx, of dw
//   linear_bwd_mma_64x64              both by 8
//   linear_dgrad_mma_64x64_any        nothing
//   linear_wgrad_mma_64x64_any        nothing
using Large = mma::Tile<128, 128, 64, 64>;
using Small = mma::Tile<64, 64, 32, 32>;
using mma::BackwardBlocks;
using mma::Unit;

extern "C" __global__ void __launch_bounds__(Large::THREADS) linear_fwd_mma_128x128(
    bf16* y, const bf16* x, const bf16* weight, const float* bias, const bf16* residual, Sizes s, bf16* activated) {
    mma::forward<Large, Unit::BLOCK>(y, activated, x, weight, bias, residual, s);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS) linear_fwd_mma_64x64(
    bf16* y, const bf16* x, const bf16* weight, const float* bias, const bf16* residual, Sizes s, bf16* activated) {
    mma::forward<Small, Unit::CHUNK>(y, activated, x, weight, bias, residual, s);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS) linear_fwd_mma_64x64_any(
    bf16* y, const bf16* x, const bf16* weight, const float* bias, const bf16* residual, Sizes s, bf16* activated) {
    mma::forward<Small, Unit::ELEMENT>(y, activated, x, weight, bias, residual, s);
}

extern "C" __global__ void __launch_bounds__(Large::THREADS) linear_bwd_mma_128x128(
    float* dw, double* sums, bf16* dx, const bf16* x, const bf16* dy, const bf16* weight, Sizes s,
    BackwardBlocks blocks) {
    mma::backward<Large, Unit::BLOCK, Large, Unit::BLOCK>(dw, sums, dx, x, dy, weight, s, blocks);
}

extern "C" __global__ void __launch_bounds__(Large::THREADS) linear_bwd_mma_64x64_128x128(
    float* dw, double* sums, bf16* dx, const bf16* x, const bf16* dy, const bf16* weight, Sizes s,
    BackwardBlocks blocks) {
    mma::backward<Small, Unit::CHUNK, Large, Unit::BLOCK>(dw, sums, dx, x, dy, weight, s, blocks);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS) linear_bwd_mma_64x64(
    float* dw, double* sums, bf16* dx, const bf16* x, const bf16* dy, const bf16* weight, Sizes s,
    BackwardBlocks blocks) {
    mma::backward<Small, Unit::CHUNK, Small, Unit::CHUNK>(dw, sums, dx, x, dy, weight, s, blocks);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS) linear_dgrad_mma_64x64_any(
    bf16* dx, const bf16* dy, const bf16* weight, Sizes s) {
    mma::dgrad<Small, Unit::ELEMENT>(dx, dy, weight, s, blockIdx.x);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS) linear_wgrad_mma_64x64_any(
    float* dw, const bf16* x, const bf16* dy, Sizes s, unsigned segment, unsigned accumulate, double* sums) {
    mma::wgrad<Small, Unit::ELEMENT>(dw, sums, x, dy, s, blockIdx.x, blockIdx.y, segment, accumulate);
}

// Entries in bf16 for a group: layers that read the same x, such as all time projections, or q, k and v.
//   linear_group_fwd_mma_128x128          c_in by 64, each c_out by 128
//   linear_group_fwd_mma_64x64            all by 8
//   linear_group_bwd_mma_128x128          all by 128; for dx alone each c_out by 64
//   linear_group_bwd_mma_64x64_128x128    all by 128; tiles of dx, of dw
//   linear_group_bwd_mma_64x64            all by 8
extern "C" __global__ void __launch_bounds__(Large::THREADS) linear_group_fwd_mma_128x128(
    const bf16* x, const bf16* weights, const float* biases, Layers layers) {
    mma::group_forward<Large, Unit::BLOCK>(x, weights, biases, layers);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS) linear_group_fwd_mma_64x64(
    const bf16* x, const bf16* weights, const float* biases, Layers layers) {
    mma::group_forward<Small, Unit::CHUNK>(x, weights, biases, layers);
}

extern "C" __global__ void __launch_bounds__(Large::THREADS) linear_group_bwd_mma_128x128(
    float* dw, double* sums, bf16* dx, float* parts, const bf16* x, const bf16* weights, Layers layers,
    BackwardBlocks blocks) {
    mma::group_backward<Large, Unit::BLOCK, Large, Unit::BLOCK>(dw, sums, dx, parts, x, weights, layers, blocks);
}

extern "C" __global__ void __launch_bounds__(Large::THREADS) linear_group_bwd_mma_64x64_128x128(
    float* dw, double* sums, bf16* dx, float* parts, const bf16* x, const bf16* weights, Layers layers,
    BackwardBlocks blocks) {
    mma::group_backward<Small, Unit::CHUNK, Large, Unit::BLOCK>(dw, sums, dx, parts, x, weights, layers, blocks);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS) linear_group_bwd_mma_64x64(
    float* dw, double* sums, bf16* dx, float* parts, const bf16* x, const bf16* weights, Layers layers,
    BackwardBlocks blocks) {
    mma::group_backward<Small, Unit::CHUNK, Small, Unit::CHUNK>(dw, sums, dx, parts, x, weights, layers, blocks);
}

// dx (len, a multiple of four) from the sums of `segments` segments (segments, len), in order.
extern "C" __global__ void __launch_bounds__(256) linear_group_join(bf16* dx, const float* parts, unsigned segments,
                                                                   size_t len) {
    const size_t i = 4 * ((size_t)blockIdx.x * 256 + threadIdx.x);
    if (i >= len) return;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (unsigned s = 0; s < segments; ++s) sum = sum + load4(parts + s * len + i);
    store4(dx + i, sum);
}

// Sums of chunks of the rows of dy to sums (chunks, c).
extern "C" __global__ void __launch_bounds__(SUM_THREADS) linear_bwd_sums_f32(
    double* sums, const float* dy, size_t rows, unsigned c, unsigned lanes) {
    sum_rows(sums, (float*)nullptr, dy, CHUNK, rows, c, lanes);
}
