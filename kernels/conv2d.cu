// conv2d: convolution with any kernel size, stride and padding, and its gradients, as matrix products whose operands
// are gathered from the images tile by tile (implicit GEMM: the im2col matrix, kh kw times as large as the image, is
// never stored).
//
// computes   fwd    y[n,i,j,o]  = b[o] + sum over u,v,k of x[n, i s + u - top, j s + v - left, k] w[o,u,v,k]
//                                 (+ shift[n,o] + residual[n,i,j,o])
//            dgrad  dx[n,p,q,k] = sum over o,u,v with p = i s + u - top, q = j s + v - left of dy[n,i,j,o] w[o,u,v,k]
//            wgrad  dw[o,u,v,k] = sum over n,i,j of dy[n,i,j,o] x[n, i s + u - top, j s + v - left, k], by split-K;
//                   add_parts adds up the segments
//            bwd    in bf16 both in one launch, with the gradients of a shortcut, and the sums of dy over the pixels of
//                   a segment, of which add_parts makes db[o]. A single dx may come on top of gradients that wait
//            x may be two tensors, its first c_first channels and the others, read and dx written where they are; and
//            what is convolved may be x with each pixel repeated in a 2x2 square (up), of which p and q above then are
//            pixels; dx is the sum over the four. residual may be repeated likewise (halved). In bf16 fwd adds a
//            shortcut, a 1x1 convolution of s, one tensor or two, as further steps of k
//            join_segments  y or dx from the sums of segments of k
//            bwd_shift  dshift[n,o] = sum over i,j of dy[n,i,j,o], and unrounded, of which add_parts makes db[o] where
//                   bwd does not
// layout     x (n, h, w, c_in), w (c_out, kh, kw, c_in), y, residual (n, oh, ow, c_out), shift (n, c_out), bias
//            (c_out): contiguous. Gradients alike.
// mapping    block = one tile of the product: in f32 on FMAs and in tf32 on tensor cores, 64 threads (tile_gemm.cuh),
//            in bf16 on tensor cores, 128 threads (tile_mma.cuh; how the operands are gathered: conv2d_mma.cuh). What
//            is said of f32 holds for tf32 but for what multiplies
//            fwd    rows = pixels of y, all images one after the other; cols = c_out; k = (u, v, c_in). up: blockIdx.y
//                   = one of four classes, of even and odd rows and columns, so that a tap is at one distance from the
//                   first in all patches
//            dgrad  blockIdx.y = one of s s classes of pixels of dx, those with p = a and q = b (mod s). A class meets
//                   the same taps, u = a + top and v = b + left (mod s), so no tap is tried in vain. rows = the class's
//                   pixels; cols = c_in; k = (u, v, c_out). Each pixel gathers its sum: no two blocks write the same
//                   element. up: k = (u, v, c_out) of each of the four
//            wgrad  rows = c_out; cols = (u, v, c_in), in bf16 those of each tensor of x in tiles of their own; k =
//                   pixels of y; blockIdx.y = one split-K segment of them
//            blockIdx.x counts tiles, along the columns first: blocks that run together read the same pixels. bf16 fwd:
//            blockIdx.z = one segment of k, where these are split. bwd: blockIdx.x counts everything, dw first
//            (BackwardBlocks)
// shared     f32: two buffers of both operands, 9 KB (64x64) or 11 KB; fwd, dgrad: the positions of the tile's pixels,
//            1 or 2 KB; wgrad: the origins of 2 BK patches, 192 B; bwd_shift: 2 KB
//            bf16: the ring, 96 KB (128x128), 54 KB (128x16) or 48 KB (64x64), in which the positions of pixels and the
//            results lie too; behind it the plan (fwd, dgrad), 0.6 to 3 KB, or the origins of four slabs' patches
//            (wgrad), 2 KB; bwd: what its larger part takes
// bound by   as tile_gemm.cuh and tile_mma.cuh say if both channel counts are 32 or more; the tile's idle columns if
//            c_out is 1 or 3; join_segments: reading the segments' sums; bwd_shift: reading dy
// host       n oh ow, n h w, kh kw c_in, kh kw c_out < 2^30; grids as stated above; tensors aligned to 16 bytes (f32:
//            vector accesses where channels divide by four; bf16: kernels by what divides the channels, as the entries
//            say, the ring as dynamic shared memory, and what conv2d_mma.cuh says)
// numerics   sums in f32. f32: fwd over (u, v, k), dgrad over (u, v, o) with the largest u and v first; tf32: the same
//            eight steps at a time, of operands rounded to 10 bits of fraction, but for bias, shift and residual; bf16:
//            over blocks of 64 channels of each tensor, in each over the taps in that order, the shortcut's last, by
//            segments in layers of few pixels; a shortcut's dx over o alone, in one. What waits to be added to dx is
//            added in f32, (first + second) + dx, and the sum rounded once. wgrad over the pixels of a segment; the
//            segments, shift and bias as column_sums.cuh says. An image's y and dx do not depend on the rest of its
//            batch
#include "column_sums.cuh"
#include "conv2d_mma.cuh"
#include "geometry.cuh"
#include "rows.cuh"
#include "tile_gemm.cuh"

// A walk over k = (tap row, tap column, channel).
struct Walk {
    unsigned t, v, c;

    __device__ Walk() {}
    __device__ Walk(unsigned k, unsigned taps_w, unsigned channels) {
        c = k % channels;
        v = k / channels % taps_w;
        t = k / channels / taps_w;
    }

    __device__ __forceinline__ void advance(unsigned by, unsigned taps_w, unsigned channels) {
        for (c += by; c >= channels; c -= channels) {
            if (++v == taps_w) {
                v = 0;
                ++t;
            }
        }
    }
};

// An image batch of `channels` channels, in one tensor or in two, which hold the first c_first of them and the others.
struct Images {
    const float *first, *second;
    unsigned c_first, channels;

    // Channel c of pixel 0, and elements from one pixel to the next. Four neighbours from a multiple of four on lie
    // side by side if four divides c_first.
    __device__ __forceinline__ const float* channel(unsigned c, unsigned& pitch) const {
        const bool of_first = c < c_first;
        pitch = of_first ? c_first : channels - c_first;
        return of_first ? first + c : second + (c - c_first);
    }

    // Four channels are loaded at once.
    __device__ __forceinline__ bool vector() const { return channels % 4 == 0 && c_first % 4 == 0; }
};

// Patches of an image batch (n, h, w, channels) as rows of a matrix, k = (tap row, tap column, channel). All are of one
// class, so that a tap is as far from the first of every patch.
template <int SIDE>
struct Patches {
    Images from;
    int patch[QUADS<SIDE>], i[QUADS<SIDE>], j[QUADS<SIDE>];
    unsigned h, w;  // of what is convolved
    Axis rows, cols;
    Walk k;
    Quad quads[QUADS<SIDE>];

    __device__ Patches(const Images& from_, const Pixel (&pixels)[SIDE], unsigned h_, unsigned w_, const Axis& rows_,
                       const Axis& cols_)
        : from(from_),
          h(h_ << rows_.up),
          w(w_ << rows_.up),
          rows(rows_),
          cols(cols_),
          k(AlongK::k(), cols.taps, from_.channels) {
#pragma unroll
        for (int r = 0; r < QUADS<SIDE>; ++r) {
            const Pixel& pixel = pixels[AlongK::row(r)];
            patch[r] = pixel.patch(h_, w_, rows.up);
            i[r] = pixel.i;
            j[r] = pixel.j;
        }
    }

    __device__ bool inside(int r, const Walk& k) const {
        return k.t < rows.taps && (unsigned)(i[r] + (int)rows.step(k.t)) < h &&
               (unsigned)(j[r] + (int)cols.step(k.v)) < w;
    }

    // Pixels from a patch's first tap on to that of k.
    __device__ int step(const Walk& k) const {
        return (int)(rows.offset(k.t) * (w >> cols.up) + cols.offset(k.v));
    }

    __device__ __forceinline__ void fetch() {
#pragma unroll
        for (int r = 0; r < QUADS<SIDE>; ++r) quads[r].clear();
        if (from.vector()) {
            unsigned pitch;
            const float* channel = from.channel(k.c, pitch);
            const int step = this->step(k);
#pragma unroll
            for (int r = 0; r < QUADS<SIDE>; ++r) {
                if (inside(r, k)) quads[r].load(channel + (long long)(patch[r] + step) * (int)pitch);
            }
        } else {
            Walk one = k;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                unsigned pitch;
                const float* channel = from.channel(one.c, pitch);
                const int step = this->step(one);
#pragma unroll
                for (int r = 0; r < QUADS<SIDE>; ++r) {
                    if (inside(r, one)) quads[r].load(e, channel + (long long)(patch[r] + step) * (int)pitch);
                }
                one.advance(1, cols.taps, from.channels);
            }
        }
        k.advance(BK, cols.taps, from.channels);
    }

    __device__ __forceinline__ void put(Side<SIDE>& tile) const { AlongK::put<SIDE>(tile, quads); }
};

// The weight (c_out, kh, kw, c_in) as a matrix with a row of c_in elements for each k = (tap row, tap column, c_out).
template <int SIDE>
struct Weights {
    const float* from;
    unsigned col, c_in, c_out, kh, kw;
    Axis rows, cols;
    Walk k[QUADS<SIDE>];
    Quad quads[QUADS<SIDE>];

    __device__ Weights(const float* from_, unsigned first_col, const Geometry& g, const Axis& rows_, const Axis& cols_)
        : from(from_),
          col(first_col + AcrossK<SIDE>::col()),
          c_in(g.c_in),
          c_out(g.c_out),
          kh(g.kh),
          kw(g.kw),
          rows(rows_),
          cols(cols_) {
#pragma unroll
        for (int i = 0; i < QUADS<SIDE>; ++i) {
            k[i] = Walk(AcrossK<SIDE>::k() + AcrossK<SIDE>::step(i), cols.taps, c_out);
        }
    }

    __device__ __forceinline__ void fetch() {
#pragma unroll
        for (int i = 0; i < QUADS<SIDE>; ++i) {
            quads[i].clear();
            if (k[i].t < rows.taps) {
                const unsigned u = rows.tap(k[i].t), v = cols.tap(k[i].v);
                load_columns(quads[i], from + (((size_t)k[i].c * kh + u) * kw + v) * c_in, col, c_in, c_in % 4 == 0);
            }
            k[i].advance(BK, cols.taps, c_out);
        }
    }

    __device__ __forceinline__ void put(Side<SIDE>& tile) const { AcrossK<SIDE>::put(tile, quads); }
};

// Where the patch of a pixel of y begins in x: the index of the first tap's pixel, row and column of what is convolved.
// A pixel beyond the end begins far outside.
struct Origin {
    int patch, i, j;
};

// The patches of x as a matrix with a row for each k = pixel of y, and the columns (u, v, c_in).
template <int SIDE>
struct PatchColumns {
    Images from;
    // Those of this step and of the next, alternating: found one step ahead by BK threads, read by all.
    Origin (*origins)[BK];
    unsigned turn, pixel, end;
    unsigned image, row, column;  // of y, where `pixel` lies
    const Geometry& g;
    Walk col;
    Quad quads[QUADS<SIDE>];

    // For pixels begin .. end. The caller must follow with a barrier.
    __device__ PatchColumns(const Images& from_, Origin (&origins_)[2][BK], const Geometry& g_, unsigned first_col,
                            unsigned begin, unsigned end_)
        : from(from_),
          origins(origins_),
          turn(0),
          pixel(begin + threadIdx.x),
          end(end_),
          image(pixel / (g_.oh * g_.ow)),
          row(pixel % (g_.oh * g_.ow) / g_.ow),
          column(pixel % g_.ow),
          g(g_),
          col(first_col + AcrossK<SIDE>::col(), g_.kw, g_.c_in) {
        find_origins(0);
    }

    __device__ __forceinline__ void find_origins(unsigned turn) {
        if (threadIdx.x < BK) {
            Origin origin = {0, -(1 << 30), 0};
            if (pixel < end) {
                origin.i = (int)(row * g.stride) - (int)g.top;
                origin.j = (int)(column * g.stride) - (int)g.left;
                origin.patch = Pixel{image, origin.i, origin.j, 0}.patch(g.h, g.w, g.up);
            }
            origins[turn][threadIdx.x] = origin;
            // A walk: two divisions in every step of BK would be a sixth of what is not an FMA.
            pixel += BK;
            for (column += BK; column >= g.ow; column -= g.ow) {
                if (++row == g.oh) {
                    row = 0;
                    ++image;
                }
            }
        }
    }

    __device__ __forceinline__ void fetch() {
#pragma unroll
        for (int i = 0; i < QUADS<SIDE>; ++i) {
            const Origin origin = origins[turn][AcrossK<SIDE>::k() + AcrossK<SIDE>::step(i)];
            quads[i].clear();
            Walk one = col;
            if (from.vector()) {
                if (inside(origin, one)) quads[i].load(place(origin, one));
            } else {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (inside(origin, one)) quads[i].load(e, place(origin, one));
                    one.advance(1, g.kw, g.c_in);
                }
            }
        }
        turn ^= 1;
        find_origins(turn);
    }

    __device__ bool inside(const Origin& origin, const Walk& col) const {
        return col.t < g.kh && (unsigned)(origin.i + (int)col.t) < g.h << g.up &&
               (unsigned)(origin.j + (int)col.v) < g.w << g.up;
    }

    // If the pixels of x are repeated, two taps read the same one: which two, depends on where the patch begins.
    __device__ const float* place(const Origin& origin, const Walk& col) const {
        const unsigned row = ((origin.i & g.up) + col.t) >> g.up, column = ((origin.j & g.up) + col.v) >> g.up;
        unsigned pitch;
        const float* channel = from.channel(col.c, pitch);
        return channel + (long long)(origin.patch + (int)(row * g.w + column)) * (int)pitch;
    }

    __device__ __forceinline__ void put(Side<SIDE>& tile) const { AcrossK<SIDE>::put(tile, quads); }
};

// Stores the tile whose first row is pixel `first` of `count`, plus `plus`.
template <class TILE, Math MATH>
__device__ __forceinline__ void store_pixels(const Results<float>& to, const Pixel (&pixels)[TILE::BM], unsigned first,
                                             unsigned count, unsigned col, const Plus<float>& plus,
                                             const Accumulators<TILE, MATH>& acc) {
#pragma unroll
    for (int q = 0; q < acc.ACROSS; ++q) {
        const Four four(col + acc.col(q), to.cols);
        if (four.count == 0) return;
#pragma unroll
        for (int i = 0; i < acc.ROWS; ++i) {
            if (first + acc.row(i) >= count) break;
            const Pixel& pixel = pixels[acc.row(i)];
            to.write(pixel.result, four, plus.to(acc.quad(i, q), four, pixel.image, pixel.result, to.cols));
        }
    }
}

template <class TILE, Math MATH>
__device__ __forceinline__ void forward(float* y, const float* x, const float* x_second, const float* weight,
                                        const Plus<float>& plus, const Geometry& g) {
    __shared__ __align__(16) TILE tile;
    __shared__ Pixel pixels[TILE::BM];
    const Class of(blockIdx.y, 1 + g.up, g.n, g.oh, g.ow);
    const unsigned depth = g.kh * g.kw * g.c_in, across = (g.c_out + TILE::BN - 1) / TILE::BN;
    const unsigned first = blockIdx.x / across * TILE::BM, first_col = blockIdx.x % across * TILE::BN;
    const Axis rows = Axis::forward(g.kh, g.stride, g.top, g.up, of.above);
    const Axis cols = Axis::forward(g.kw, g.stride, g.left, g.up, of.before);
    for (unsigned r = threadIdx.x; r < TILE::BM; r += THREADS) pixels[r] = of.pixel(first + r, rows, cols);
    __syncthreads();  // pixels written above are read by the operands and the epilogue

    Patches<TILE::BM> a({x, x_second, g.c_first, g.c_in}, pixels, g.h, g.w, rows, cols);
    Rows<TILE::BN> b(weight, first_col, g.c_out, depth);
    Accumulators<TILE, MATH> acc;
    multiply(tile, a, b, (depth + BK - 1) / BK, acc);
    store_pixels({y, nullptr, g.c_out, g.c_out}, pixels, first, of.count, first_col, plus, acc);
}

template <class TILE, Math MATH>
__device__ __forceinline__ void dgrad(float* dx, float* dx_second, const float* dy, const float* weight,
                                      const Geometry& g) {
    __shared__ __align__(16) TILE tile;
    __shared__ Pixel pixels[TILE::BM];
    const Class of(blockIdx.y, g.stride, g.n, g.h, g.w);
    const unsigned across = (g.c_in + TILE::BN - 1) / TILE::BN;
    const unsigned first = blockIdx.x / across * TILE::BM, first_col = blockIdx.x % across * TILE::BN;
    if (first >= of.count) return;
    const Axis rows = Axis::backward(of.above, g.kh, g.stride, g.top, g.up);
    const Axis cols = Axis::backward(of.before, g.kw, g.stride, g.left, g.up);
    for (unsigned r = threadIdx.x; r < TILE::BM; r += THREADS) pixels[r] = of.pixel(first + r, rows, cols);
    __syncthreads();  // pixels written above are read by the operands and the epilogue

    Patches<TILE::BM> a({dy, nullptr, g.c_out, g.c_out}, pixels, g.oh, g.ow, rows, cols);
    Weights<TILE::BN> b(weight, first_col, g, rows, cols);
    Accumulators<TILE, MATH> acc;
    multiply(tile, a, b, (rows.taps * cols.taps * g.c_out + BK - 1) / BK, acc);
    store_pixels({dx, dx_second, g.c_first, g.c_in}, pixels, first, of.count, first_col, Plus<float>{}, acc);
}

// Writes `dw` if one segment has all pixels, otherwise each segment's partial sums to (segments, c_out, kh, kw, c_in).
template <class TILE, Math MATH>
__device__ __forceinline__ void wgrad(float* dw, const float* x, const float* x_second, const float* dy,
                                      const Geometry& g, unsigned segment, bool add) {
    __shared__ __align__(16) TILE tile;
    __shared__ Origin origins[2][BK];
    const unsigned count = g.n * g.oh * g.ow, width = g.kh * g.kw * g.c_in;
    const unsigned across = (width + TILE::BN - 1) / TILE::BN;
    const unsigned first = blockIdx.x / across * TILE::BM, first_col = blockIdx.x % across * TILE::BN;
    const unsigned begin = blockIdx.y * segment, end = min(begin + segment, count);

    Columns<TILE::BM> a(dy, first, g.c_out, begin, end);
    PatchColumns<TILE::BN> b({x, x_second, g.c_first, g.c_in}, origins, g, first_col, begin, end);
    __syncthreads();  // the first fetch reads the first origins; multiply's barriers order the later ones
    Accumulators<TILE, MATH> acc;
    multiply(tile, a, b, (end - begin + BK - 1) / BK, acc);
    store_tile(dw + (size_t)blockIdx.y * g.c_out * width, first, g.c_out, first_col, width, add, acc);
}

// Adds up the sums of `segments` segments (segments, rows, cols) in order, plus `plus`; an image has `pixels` rows.
__device__ __forceinline__ void join_segments(const Results<bf16>& to, const float* parts, unsigned segments,
                                              size_t rows, const Plus<bf16>& plus, unsigned pixels,
                                              unsigned lane_bits) {
    const size_t row = row_of_thread(lane_bits);
    if (row >= rows) return;
    each_item((to.cols + 3) / 4, lane_bits, [&](unsigned k) {
        const Four four(4 * k, to.cols);
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (unsigned s = 0; s < segments; ++s) sum = sum + four.read(parts + (s * rows + row) * to.cols + four.col);
        to.write(row, four, plus.to(sum, four, row / pixels, row, to.cols));
    });
}

// Entries in f32, named after their tile BM x BN:
//   conv2d_fwd_64x64    conv2d_dgrad_64x64    conv2d_wgrad_64x64     square: least traffic per result
//   conv2d_fwd_128x32   conv2d_dgrad_128x32                          for few columns: channels
//   conv2d_wgrad_32x128                                              for few rows: channels of y
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) conv2d_fwd_64x64_f32(
    float* y, const float* x, const float* x_second, const float* weight, const float* bias, const float* shift,
    const float* residual, unsigned halved, Geometry g) {
    forward<Tile<64, 64>, Math::FMA>(y, x, x_second, weight, {bias, shift, residual, halved, nullptr}, g);
}

extern "C" __global__ void __launch_bounds__(THREADS) conv2d_fwd_128x32_f32(
    float* y, const float* x, const float* x_second, const float* weight, const float* bias, const float* shift,
    const float* residual, unsigned halved, Geometry g) {
    forward<Tile<128, 32>, Math::FMA>(y, x, x_second, weight, {bias, shift, residual, halved, nullptr}, g);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) conv2d_dgrad_64x64_f32(
    float* dx, float* dx_second, const float* dy, const float* weight, Geometry g) {
    dgrad<Tile<64, 64>, Math::FMA>(dx, dx_second, dy, weight, g);
}

extern "C" __global__ void __launch_bounds__(THREADS) conv2d_dgrad_128x32_f32(
    float* dx, float* dx_second, const float* dy, const float* weight, Geometry g) {
    dgrad<Tile<128, 32>, Math::FMA>(dx, dx_second, dy, weight, g);
}

extern "C" __global__ void __launch_bounds__(THREADS) conv2d_wgrad_64x64_f32(
    float* dw, const float* x, const float* x_second, const float* dy, Geometry g, unsigned segment,
    unsigned accumulate) {
    wgrad<Tile<64, 64>, Math::FMA>(dw, x, x_second, dy, g, segment, accumulate);
}

extern "C" __global__ void __launch_bounds__(THREADS) conv2d_wgrad_32x128_f32(
    float* dw, const float* x, const float* x_second, const float* dy, Geometry g, unsigned segment,
    unsigned accumulate) {
    wgrad<Tile<32, 128>, Math::FMA>(dw, x, x_second, dy, g, segment, accumulate);
}

// Blocks of 64x64 that a multiprocessor holds at once, in fwd and dgrad in tf32: of itself ptxas aims at eight, 128
// registers a thread, and spills up to 32 bytes.
constexpr int TF32_RESIDENT = 6;

// Entries in tf32, on tensor cores, with the same tiles.
extern "C" __global__ void __launch_bounds__(THREADS, TF32_RESIDENT) conv2d_fwd_64x64_tf32(
    float* y, const float* x, const float* x_second, const float* weight, const float* bias, const float* shift,
    const float* residual, unsigned halved, Geometry g) {
    forward<Tile<64, 64>, Math::TF32>(y, x, x_second, weight, {bias, shift, residual, halved, nullptr}, g);
}

extern "C" __global__ void __launch_bounds__(THREADS) conv2d_fwd_128x32_tf32(
    float* y, const float* x, const float* x_second, const float* weight, const float* bias, const float* shift,
    const float* residual, unsigned halved, Geometry g) {
    forward<Tile<128, 32>, Math::TF32>(y, x, x_second, weight, {bias, shift, residual, halved, nullptr}, g);
}

extern "C" __global__ void __launch_bounds__(THREADS, TF32_RESIDENT) conv2d_dgrad_64x64_tf32(
    float* dx, float* dx_second, const float* dy, const float* weight, Geometry g) {
    dgrad<Tile<64, 64>, Math::TF32>(dx, dx_second, dy, weight, g);
}

extern "C" __global__ void __launch_bounds__(THREADS) conv2d_dgrad_128x32_tf32(
    float* dx, float* dx_second, const float* dy, const float* weight, Geometry g) {
    dgrad<Tile<128, 32>, Math::TF32>(dx, dx_second, dy, weight, g);
}

extern "C" __global__ void __launch_bounds__(THREADS) conv2d_wgrad_64x64_tf32(
    float* dw, const float* x, const float* x_second, const float* dy, Geometry g, unsigned segment,
    unsigned accumulate) {
    wgrad<Tile<64, 64>, Math::TF32>(dw, x, x_second, dy, g, segment, accumulate);
}

extern "C" __global__ void __launch_bounds__(THREADS) conv2d_wgrad_32x128_tf32(
    float* dw, const float* x, const float* x_second, const float* dy, Geometry g, unsigned segment,
    unsigned accumulate) {
    wgrad<Tile<32, 128>, Math::TF32>(dw, x, x_second, dy, g, segment, accumulate);
}

// Entries in bf16, on tensor cores, and what must divide the channels, those of the shortcut's tensors too:
//   conv2d_fwd_mma_128x128           c_in by 64
//   conv2d_fwd_mma_128x16            c_in by 8; for few channels of y
//   conv2d_fwd_mma_64x64             c_in by 8
//   conv2d_fwd_mma_64x64_any         nothing
//   conv2d_bwd_mma_128x128           c_out by 128, c_in by 128; for dx alone c_out by 64, for dw alone c_in by 8
//   conv2d_bwd_mma_64x64_128x128     c_out by 128, c_in by 8; tiles of dx, of dw
//   conv2d_bwd_mma_64x64             both by 8
//   conv2d_dgrad_mma_64x64_any       nothing
//   conv2d_wgrad_mma_64x64_any_x     c_out by 8
//   conv2d_wgrad_mma_64x64_any_y     c_in by 8
//   conv2d_wgrad_mma_64x64_any       nothing
// conv2d_fwd_mma_64x64, and conv2d_bwd_mma_64x64... for dx, sum by segments of k. For three blocks of
// conv2d_wgrad_mma_64x64_any... a multiprocessor the registers do not suffice: ptxas spills on sm_80 and sm_120.
using Large = mma::Tile<128, 128, 64, 64>;
using Small = mma::Tile<64, 64, 32, 32>;
using Thin = mma::Tile<128, 16, 32, 16>;
using mma::BackwardBlocks;
using mma::Unit;

extern "C" __global__ void __launch_bounds__(Large::THREADS) conv2d_fwd_mma_128x128(
    bf16* y, const bf16* x, const bf16* x_second, const bf16* weight, const float* bias, const bf16* shift,
    const bf16* residual, unsigned halved, const bf16* s, const bf16* s_second, const bf16* s_weight,
    const float* s_bias, Geometry g) {
    mma::forward<Large, Unit::BLOCK, false>(y, nullptr, x, x_second, weight, {s, s_second, s_weight},
        {bias, shift, residual, halved, s_bias}, g, 0);
}

extern "C" __global__ void __launch_bounds__(Thin::THREADS) conv2d_fwd_mma_128x16(
    bf16* y, const bf16* x, const bf16* x_second, const bf16* weight, const float* bias, const bf16* shift,
    const bf16* residual, unsigned halved, const bf16* s, const bf16* s_second, const bf16* s_weight,
    const float* s_bias, Geometry g) {
    mma::forward<Thin, Unit::CHUNK, false>(y, nullptr, x, x_second, weight, {s, s_second, s_weight},
        {bias, shift, residual, halved, s_bias}, g, 0);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS) conv2d_fwd_mma_64x64(
    bf16* y, float* parts, const bf16* x, const bf16* x_second, const bf16* weight, const float* bias,
    const bf16* shift, const bf16* residual, unsigned halved, const bf16* s, const bf16* s_second, const bf16* s_weight,
    const float* s_bias, Geometry g, unsigned segment) {
    mma::forward<Small, Unit::CHUNK, true>(y, parts, x, x_second, weight, {s, s_second, s_weight},
        {bias, shift, residual, halved, s_bias}, g, segment);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS) conv2d_fwd_mma_64x64_any(
    bf16* y, const bf16* x, const bf16* x_second, const bf16* weight, const float* bias, const bf16* shift,
    const bf16* residual, unsigned halved, const bf16* s, const bf16* s_second, const bf16* s_weight,
    const float* s_bias, Geometry g) {
    mma::forward<Small, Unit::ELEMENT, false>(y, nullptr, x, x_second, weight, {s, s_second, s_weight},
        {bias, shift, residual, halved, s_bias}, g, 0);
}

extern "C" __global__ void __launch_bounds__(Large::THREADS) conv2d_bwd_mma_128x128(
    float* dw, double* sums, bf16* dx, bf16* dx_second, bf16* ds, bf16* ds_second, float* parts, const bf16* x,
    const bf16* x_second, const bf16* s, const bf16* s_second, const bf16* dy, const bf16* weight, const bf16* s_weight,
    const bf16* waiting, const bf16* waiting_second, Geometry g, BackwardBlocks blocks) {
    mma::backward<Large, Unit::BLOCK, false, Large, Unit::BLOCK>(
        dw, sums, {dx, dx_second, weight, waiting, waiting_second}, {ds, ds_second, s_weight, nullptr, nullptr}, parts,
        {x, x_second, s, s_second}, dy, g, blocks);
}

extern "C" __global__ void __launch_bounds__(Large::THREADS) conv2d_bwd_mma_64x64_128x128(
    float* dw, double* sums, bf16* dx, bf16* dx_second, bf16* ds, bf16* ds_second, float* parts, const bf16* x,
    const bf16* x_second, const bf16* s, const bf16* s_second, const bf16* dy, const bf16* weight, const bf16* s_weight,
    const bf16* waiting, const bf16* waiting_second, Geometry g, BackwardBlocks blocks) {
    mma::backward<Small, Unit::CHUNK, true, Large, Unit::BLOCK>(
        dw, sums, {dx, dx_second, weight, waiting, waiting_second}, {ds, ds_second, s_weight, nullptr, nullptr}, parts,
        {x, x_second, s, s_second}, dy, g, blocks);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS) conv2d_bwd_mma_64x64(
    float* dw, double* sums, bf16* dx, bf16* dx_second, bf16* ds, bf16* ds_second, float* parts, const bf16* x,
    const bf16* x_second, const bf16* s, const bf16* s_second, const bf16* dy, const bf16* weight, const bf16* s_weight,
    const bf16* waiting, const bf16* waiting_second, Geometry g, BackwardBlocks blocks) {
    mma::backward<Small, Unit::CHUNK, true, Small, Unit::CHUNK>(
        dw, sums, {dx, dx_second, weight, waiting, waiting_second}, {ds, ds_second, s_weight, nullptr, nullptr}, parts,
        {x, x_second, s, s_second}, dy, g, blocks);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS) conv2d_dgrad_mma_64x64_any(
    bf16* dx, bf16* dx_second, const bf16* dy, const bf16* weight, Geometry g) {
    mma::dgrad<Small, Unit::ELEMENT, false>({dx, dx_second, weight, nullptr, nullptr}, {}, nullptr, dy, g, 0,
        mma::DxAlone());
}

extern "C" __global__ void __launch_bounds__(Small::THREADS, 2) conv2d_wgrad_mma_64x64_any_x(
    float* dw, const bf16* x, const bf16* x_second, const bf16* dy, Geometry g, unsigned segment, unsigned accumulate,
    double* sums) {
    mma::wgrad<Small, Unit::ELEMENT, Unit::CHUNK>(dw, sums, {x, x_second, nullptr, nullptr}, dy, g, segment,
        accumulate, mma::DwAlone());
}

extern "C" __global__ void __launch_bounds__(Small::THREADS, 2) conv2d_wgrad_mma_64x64_any_y(
    float* dw, const bf16* x, const bf16* x_second, const bf16* dy, Geometry g, unsigned segment, unsigned accumulate,
    double* sums) {
    mma::wgrad<Small, Unit::CHUNK, Unit::ELEMENT>(dw, sums, {x, x_second, nullptr, nullptr}, dy, g, segment,
        accumulate, mma::DwAlone());
}

extern "C" __global__ void __launch_bounds__(Small::THREADS, 2) conv2d_wgrad_mma_64x64_any(
    float* dw, const bf16* x, const bf16* x_second, const bf16* dy, Geometry g, unsigned segment, unsigned accumulate,
    double* sums) {
    mma::wgrad<Small, Unit::ELEMENT, Unit::ELEMENT>(dw, sums, {x, x_second, nullptr, nullptr}, dy, g, segment,
        accumulate, mma::DwAlone());
}

extern "C" __global__ void __launch_bounds__(256) conv2d_join_segments(
    bf16* to, bf16* to_second, const float* parts, const float* bias, const bf16* shift, const bf16* residual,
    unsigned halved, const float* s_bias, unsigned segments, size_t rows, unsigned c_first, unsigned cols,
    unsigned pixels, unsigned lane_bits) {
    join_segments({to, to_second, c_first, cols}, parts, segments, rows, {bias, shift, residual, halved, s_bias},
                  pixels, lane_bits);
}

#define ENTRIES(suffix, T) \
    extern "C" __global__ void __launch_bounds__(SUM_THREADS) conv2d_bwd_shift_##suffix( \
        double* sums, T* dshift, const T* dy, unsigned pixels, size_t all_pixels, unsigned c, unsigned lanes) { \
        sum_rows(sums, dshift, dy, pixels, all_pixels, c, lanes); \
    }
F32_AND_BF16(ENTRIES)
#undef ENTRIES
