// conv2d: convolution with any kernel size, stride and padding, and its gradients, as matrix products whose operands
// are gathered from the images tile by tile (implicit GEMM: the im2col matrix, kh kw times as large as the image, is
// never stored).
//
// computes   fwd    y[n,i,j,o]  = b[o] + sum over u,v,k of x[n, i s + u - top, j s + v - left, k] w[o,u,v,k]
//                                 (+ shift[n,o] + residual[n,i,j,o])
//            dgrad  dx[n,p,q,k] = sum over o,u,v with p = i s + u - top, q = j s + v - left of dy[n,i,j,o] w[o,u,v,k]
//            wgrad  dw[o,u,v,k] = sum over n,i,j of dy[n,i,j,o] x[n, i s + u - top, j s + v - left, k], by split-K;
//                   sum_parts adds up the segments
//            bwd_shift  dshift[n,o] = sum over i,j of dy[n,i,j,o];  bwd_bias  db[o] = sum over n of the same, unrounded
// layout     x (n, h, w, c_in), w (c_out, kh, kw, c_in), y, residual (n, oh, ow, c_out), shift (n, c_out), bias
//            (c_out): contiguous. Gradients alike.
// mapping    block = 64 threads = one tile of the product (tile_gemm.cuh)
//            fwd    rows = pixels of y, all images one after the other; cols = c_out; k = (u, v, c_in)
//            dgrad  blockIdx.y = one of s s classes of pixels of dx, those with p = a and q = b (mod s). A class meets
//                   the same taps, u = a + top and v = b + left (mod s), so no tap is tried in vain. rows = the class's
//                   pixels; cols = c_in; k = (u, v, c_out). Each pixel gathers its sum: no two blocks write the same
//                   element
//            wgrad  rows = c_out; cols = (u, v, c_in); k = pixels of y; blockIdx.y = one split-K segment of them
//            blockIdx.x counts tiles, along the columns first: blocks that run together read the same pixels
// shared     two buffers of both operands, 9 KB (64x64) or 11 KB; fwd, dgrad: the positions of the tile's pixels, 2 or
//            4 KB; wgrad: the origins of 2 BK patches, 256 B; bwd_shift: 2 KB
// bound by   as tile_gemm.cuh says if both channel counts are 32 or more; the tile's idle columns if c_out is 1 or 3;
//            bwd_shift: reading dy
// host       n oh ow, n h w, kh kw c_in, kh kw c_out < 2^30; grids as stated above; tensors aligned to 16 bytes (vector
//            accesses where channels divide by four)
// numerics   sums in f32: fwd over (u, v, k), dgrad over (u, v, o) with the largest u and v first, wgrad over the
//            pixels of a segment; the segments, shift and bias as column_sums.cuh says. An image's y and dx do not
//            depend on the rest of its batch
#include "column_sums.cuh"
#include "tile_gemm.cuh"

// Host twin: the sizes of a convolution.
struct Geometry {
    unsigned n, h, w, c_in;  // x
    unsigned oh, ow, c_out;  // y
    unsigned kh, kw;         // kernel
    unsigned stride, top, left;
};

// One dimension of a walk over the taps that reach a pixel: tap t of `taps` reads row (or column)
// i * stride + first + t, with the weight's row (or column) u + t * du.
struct Axis {
    unsigned taps, stride;
    int first, u, du;

    __device__ static Axis forward(unsigned k, unsigned stride, unsigned before) {
        return {k, stride, -(int)before, 0, 1};
    }

    // Pixels p = i s + a of dx receive dy's pixel i + (a + before - u) / s through the taps u = a + before (mod s),
    // largest u first.
    __device__ static Axis backward(unsigned a, unsigned k, unsigned s, unsigned before) {
        const unsigned smallest = (a + before) % s;
        const unsigned taps = smallest < k ? (k - 1 - smallest) / s + 1 : 0;
        const int largest = (int)(smallest + taps * s) - (int)s;
        return {taps, 1, ((int)(a + before) - largest) / (int)s, largest, -(int)s};
    }
};

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

// A row of the tile: the offsets, in elements, of its patch in the image batch (negative in the first image's padding)
// and of its result.
struct Pixel {
    long long patch, result;
    int i, j;
    unsigned image;
};

// Patches of an image batch `from` (n, h, w, channels) as rows of a matrix, k = (tap row, tap column, channel).
template <class T, int SIDE>
struct Patches {
    const T* from[QUADS<SIDE>];
    int i[QUADS<SIDE>], j[QUADS<SIDE>];
    unsigned h, w, channels, taps_h, taps_w;
    Walk k;
    Quad<T> quads[QUADS<SIDE>];

    __device__ Patches(const T* from_, const Pixel (&pixels)[SIDE], unsigned h_, unsigned w_, unsigned channels_,
                       const Axis& rows, const Axis& cols)
        : h(h_),
          w(w_),
          channels(channels_),
          taps_h(rows.taps),
          taps_w(cols.taps),
          k(AlongK::k(), cols.taps, channels_) {
#pragma unroll
        for (int r = 0; r < QUADS<SIDE>; ++r) {
            const Pixel& pixel = pixels[AlongK::row(r)];
            from[r] = from_ + pixel.patch;
            i[r] = pixel.i;
            j[r] = pixel.j;
        }
    }

    __device__ bool inside(int r, const Walk& k) const {
        return k.t < taps_h && (unsigned)(i[r] + (int)k.t) < h && (unsigned)(j[r] + (int)k.v) < w;
    }

    __device__ __forceinline__ void fetch() {
#pragma unroll
        for (int r = 0; r < QUADS<SIDE>; ++r) quads[r].clear();
        if (channels % 4 == 0) {
            const size_t place = (size_t)(k.t * w + k.v) * channels + k.c;
#pragma unroll
            for (int r = 0; r < QUADS<SIDE>; ++r) {
                if (inside(r, k)) quads[r].load(from[r] + place);
            }
        } else {
            Walk one = k;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const size_t place = (size_t)(one.t * w + one.v) * channels + one.c;
#pragma unroll
                for (int r = 0; r < QUADS<SIDE>; ++r) {
                    if (inside(r, one)) quads[r].load(e, from[r] + place);
                }
                one.advance(1, taps_w, channels);
            }
        }
        k.advance(BK, taps_w, channels);
    }

    __device__ __forceinline__ void put(Side<SIDE>& tile) const { AlongK::put<T, SIDE>(tile, quads); }
};

// The weight (c_out, kh, kw, c_in) as a matrix with a row of c_in elements for each k = (tap row, tap column, c_out).
template <class T, int SIDE>
struct Weights {
    const T* from;
    unsigned col, c_in, c_out, kh, kw;
    Axis rows, cols;
    Walk k[QUADS<SIDE>];
    Quad<T> quads[QUADS<SIDE>];

    __device__ Weights(const T* from_, unsigned first_col, const Geometry& g, const Axis& rows_, const Axis& cols_)
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
                const unsigned u = rows.u + (int)k[i].t * rows.du, v = cols.u + (int)k[i].v * cols.du;
                load_columns(quads[i], from + (((size_t)k[i].c * kh + u) * kw + v) * c_in, col, c_in, c_in % 4 == 0);
            }
            k[i].advance(BK, cols.taps, c_out);
        }
    }

    __device__ __forceinline__ void put(Side<SIDE>& tile) const { AcrossK<SIDE>::put(tile, quads); }
};

// Where the patch of a pixel of y begins in x: element offset, row and column. A pixel beyond the end begins far
// outside.
struct Origin {
    long long patch;
    int i, j;
};

// The patches of x as a matrix with a row for each k = pixel of y, and the columns (u, v, c_in).
template <class T, int SIDE>
struct PatchColumns {
    const T* from;
    // Those of this step and of the next, alternating: found one step ahead by BK threads, read by all.
    Origin (*origins)[BK];
    unsigned turn, pixel, end;
    unsigned image, row, column;  // of y, where `pixel` lies
    const Geometry& g;
    Walk col;
    Quad<T> quads[QUADS<SIDE>];

    // For pixels begin .. end. The caller must follow with a barrier.
    __device__ PatchColumns(const T* from_, Origin (&origins_)[2][BK], const Geometry& g_, unsigned first_col,
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
                origin.patch = (((long long)image * g.h + origin.i) * g.w + origin.j) * g.c_in;
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
            if (g.c_in % 4 == 0) {
                if (inside(origin, one)) quads[i].load(from + origin.patch + place(one));
            } else {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (inside(origin, one)) quads[i].load(e, from + origin.patch + place(one));
                    one.advance(1, g.kw, g.c_in);
                }
            }
        }
        turn ^= 1;
        find_origins(turn);
    }

    __device__ bool inside(const Origin& origin, const Walk& col) const {
        return col.t < g.kh && (unsigned)(origin.i + (int)col.t) < g.h && (unsigned)(origin.j + (int)col.v) < g.w;
    }

    __device__ size_t place(const Walk& col) const { return (size_t)(col.t * g.w + col.v) * g.c_in + col.c; }

    __device__ __forceinline__ void put(Side<SIDE>& tile) const { AcrossK<SIDE>::put(tile, quads); }
};

// What the epilogue adds; null for none.
template <class T>
struct Plus {
    const float* bias;
    const T* shift;
    const T* residual;
};

// Stores the tile whose first row is pixel `first` of `count`, plus `plus`.
template <class TILE, class T>
__device__ __forceinline__ void store_pixels(T* to, const Pixel (&pixels)[TILE::BM], unsigned first, unsigned count,
                                             unsigned col, unsigned cols, const Plus<T>& plus,
                                             const Accumulators<TILE>& acc) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Four four(col + acc.col(half), cols);
        if (four.count == 0) return;
        float4 bias = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (plus.bias) bias = four.read(plus.bias + four.col);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (first + acc.row(i) >= count) break;
            const Pixel& pixel = pixels[acc.row(i)];
            float4 v = acc.quad(i, half) + bias;
            if (plus.shift) v = v + four.read(plus.shift + (size_t)pixel.image * cols + four.col);
            if (plus.residual) v = v + four.read(plus.residual + pixel.result + four.col);
            four.write(to + pixel.result + four.col, v);
        }
    }
}

template <class TILE, class T>
__device__ __forceinline__ void forward(T* y, const T* x, const T* weight, const Plus<T>& plus, const Geometry& g) {
    __shared__ __align__(16) TILE tile;
    __shared__ Pixel pixels[TILE::BM];
    const unsigned count = g.n * g.oh * g.ow, depth = g.kh * g.kw * g.c_in;
    const unsigned across = (g.c_out + TILE::BN - 1) / TILE::BN;
    const unsigned first = blockIdx.x / across * TILE::BM, first_col = blockIdx.x % across * TILE::BN;
    const Axis rows = Axis::forward(g.kh, g.stride, g.top), cols = Axis::forward(g.kw, g.stride, g.left);
    for (unsigned r = threadIdx.x; r < TILE::BM; r += THREADS) {
        const unsigned p = min(first + r, count - 1);
        const unsigned image = p / (g.oh * g.ow), rest = p % (g.oh * g.ow);
        const int i = (int)(rest / g.ow * rows.stride) + rows.first, j = (int)(rest % g.ow * cols.stride) + cols.first;
        pixels[r] = {(((long long)image * g.h + i) * g.w + j) * g.c_in, (long long)p * g.c_out, i, j, image};
    }
    __syncthreads();  // pixels written above are read by the operands and the epilogue

    Patches<T, TILE::BM> a(x, pixels, g.h, g.w, g.c_in, rows, cols);
    Rows<T, TILE::BN> b(weight, first_col, g.c_out, depth);
    Accumulators<TILE> acc;
    multiply(tile, a, b, (depth + BK - 1) / BK, acc);
    store_pixels(y, pixels, first, count, first_col, g.c_out, plus, acc);
}

template <class TILE, class T>
__device__ __forceinline__ void dgrad(T* dx, const T* dy, const T* weight, const Geometry& g) {
    __shared__ __align__(16) TILE tile;
    __shared__ Pixel pixels[TILE::BM];
    const unsigned s = g.stride, above = blockIdx.y / s, before = blockIdx.y % s;
    // The class: pixels (above + s i, before + s j).
    const unsigned h = (g.h + s - 1 - above) / s, w = (g.w + s - 1 - before) / s, count = g.n * h * w;
    const unsigned across = (g.c_in + TILE::BN - 1) / TILE::BN;
    const unsigned first = blockIdx.x / across * TILE::BM, first_col = blockIdx.x % across * TILE::BN;
    if (first >= count) return;
    const Axis rows = Axis::backward(above, g.kh, s, g.top), cols = Axis::backward(before, g.kw, s, g.left);
    for (unsigned r = threadIdx.x; r < TILE::BM; r += THREADS) {
        const unsigned p = min(first + r, count - 1);
        const unsigned image = p / (h * w), rest = p % (h * w), row = rest / w, col = rest % w;
        const int i = (int)row + rows.first, j = (int)col + cols.first;
        Pixel& pixel = pixels[r];
        pixel.patch = (((long long)image * g.oh + i) * g.ow + j) * g.c_out;
        pixel.result = (((long long)image * g.h + row * s + above) * g.w + col * s + before) * g.c_in;
        pixel.i = i;
        pixel.j = j;
        pixel.image = image;
    }
    __syncthreads();  // pixels written above are read by the operands and the epilogue

    Patches<T, TILE::BM> a(dy, pixels, g.oh, g.ow, g.c_out, rows, cols);
    Weights<T, TILE::BN> b(weight, first_col, g, rows, cols);
    Accumulators<TILE> acc;
    multiply(tile, a, b, (rows.taps * cols.taps * g.c_out + BK - 1) / BK, acc);
    store_pixels(dx, pixels, first, count, first_col, g.c_in, Plus<T>{nullptr, nullptr, nullptr}, acc);
}

// Writes `dw` if one segment has all pixels, otherwise each segment's partial sums to (segments, c_out, kh, kw, c_in).
template <class TILE, class T>
__device__ __forceinline__ void wgrad(float* dw, const T* x, const T* dy, const Geometry& g, unsigned segment,
                                      bool add) {
    __shared__ __align__(16) TILE tile;
    __shared__ __align__(16) Origin origins[2][BK];
    const unsigned count = g.n * g.oh * g.ow, width = g.kh * g.kw * g.c_in;
    const unsigned across = (width + TILE::BN - 1) / TILE::BN;
    const unsigned first = blockIdx.x / across * TILE::BM, first_col = blockIdx.x % across * TILE::BN;
    const unsigned begin = blockIdx.y * segment, end = min(begin + segment, count);

    Columns<T, TILE::BM> a(dy, first, g.c_out, begin, end);
    PatchColumns<T, TILE::BN> b(x, origins, g, first_col, begin, end);
    __syncthreads();  // the first fetch reads the first origins; multiply's barriers order the later ones
    Accumulators<TILE> acc;
    multiply(tile, a, b, (end - begin + BK - 1) / BK, acc);
    store_tile(dw + (size_t)blockIdx.y * g.c_out * width, first, g.c_out, first_col, width, add, acc);
}

// Entries, each in f32 and bf16, named after their tile BM x BN:
//   conv2d_fwd_64x64    conv2d_dgrad_64x64    conv2d_wgrad_64x64     square: least traffic per result
//   conv2d_fwd_128x32   conv2d_dgrad_128x32                          for few columns: channels
//   conv2d_wgrad_32x128                                              for few rows: channels of y
//   conv2d_bwd_shift
#define ENTRIES(suffix, T) \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) conv2d_fwd_64x64_##suffix( \
        T* y, const T* x, const T* weight, const float* bias, const T* shift, const T* residual, \
        Geometry g) { \
        forward<Tile<64, 64>, T>(y, x, weight, {bias, shift, residual}, g); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS) conv2d_fwd_128x32_##suffix( \
        T* y, const T* x, const T* weight, const float* bias, const T* shift, const T* residual, \
        Geometry g) { \
        forward<Tile<128, 32>, T>(y, x, weight, {bias, shift, residual}, g); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) conv2d_dgrad_64x64_##suffix( \
        T* dx, const T* dy, const T* weight, Geometry g) { \
        dgrad<Tile<64, 64>>(dx, dy, weight, g); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS) conv2d_dgrad_128x32_##suffix( \
        T* dx, const T* dy, const T* weight, Geometry g) { \
        dgrad<Tile<128, 32>>(dx, dy, weight, g); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS) conv2d_wgrad_64x64_##suffix( \
        float* dw, const T* x, const T* dy, Geometry g, unsigned segment, unsigned accumulate) { \
        wgrad<Tile<64, 64>>(dw, x, dy, g, segment, accumulate); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS) conv2d_wgrad_32x128_##suffix( \
        float* dw, const T* x, const T* dy, Geometry g, unsigned segment, unsigned accumulate) { \
        wgrad<Tile<32, 128>>(dw, x, dy, g, segment, accumulate); \
    } \
    extern "C" __global__ void __launch_bounds__(SUM_THREADS) conv2d_bwd_shift_##suffix( \
        double* sums, T* dshift, const T* dy, unsigned pixels, size_t all_pixels, unsigned c, unsigned lanes) { \
        sum_rows(sums, dshift, dy, pixels, all_pixels, c, lanes); \
    }
F32_AND_BF16(ENTRIES)
#undef ENTRIES

extern "C" __global__ void __launch_bounds__(SUM_THREADS) conv2d_bwd_bias(
    float* db, const double* sums, unsigned n, size_t c, unsigned accumulate, unsigned lanes) {
    sum_parts(db, sums, n, c, accumulate, lanes);
}

extern "C" __global__ void __launch_bounds__(SUM_THREADS) conv2d_sum_parts(
    float* to, const float* parts, unsigned count, size_t len, unsigned accumulate, unsigned lanes) {
    sum_parts(to, parts, count, len, accumulate, lanes);
}
