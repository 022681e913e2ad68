// The convolution's products on tensor cores (tile_mma.cuh): how each gathers its slabs.
//
// k          fwd, dgrad  a slab is one tap's next 64 channels (fewer at the end: zeros). All taps of a block of 64 come
//                        first, then those of the next: taps read the same pixels, while these are in the caches.
//                        From slab to slab one offset is added to the addresses of all rows (Walk), which needs no
//                        division; whether a row's pixel is inside the image is one test of two packed masks (Taps)
//            wgrad       a slab is 64 pixels of y; their places in x and their masks are found two slabs ahead, by one
//                        thread each, also without division (Origins)
// segments   a layer of few pixels has its k cut into segments of whole slabs, by its shape alone: each is summed from
//            zero, then the segments' sums are added in order. In a product with few tiles each segment has blocks of
//            its own (blockIdx.z), and conv2d_join_segments adds up; in others a block goes through all of them. Either
//            way the bits are the same, so that an image's do not depend on its batch
// host       kh, kw < 16; kh w c, kh kw c_in c_out < 2^31, with the c and w of the image that is gathered from
#pragma once
#include "geometry.cuh"
#include "tile_mma.cuh"

namespace mma {

// Sets of taps: bit u for tap row u, bit 16 + v for tap column v.
using Taps = unsigned;

__device__ __forceinline__ Taps tap_row(unsigned u) { return 1u << u; }
__device__ __forceinline__ Taps tap_col(unsigned v) { return 1u << (16 + v); }

// Bits 0 .. k of those taps t for which 0 <= from + t < len.
__device__ __forceinline__ unsigned inside(int from, unsigned k, unsigned len) {
    const int first = max(-from, 0), end = min((int)k, (int)len - from);
    return first < end ? (1u << end) - (1u << first) : 0;
}

// The taps of a patch from (i, j) on that are inside an image of h x w.
__device__ __forceinline__ Taps inside(int i, int j, unsigned taps_h, unsigned taps_w, unsigned h, unsigned w) {
    return inside(i, taps_h, h) | inside(j, taps_w, w) << 16;
}

// What to add to an offset to get to the next tap column, tap row and block of channels.
struct Deltas {
    int col, row, block;

    __device__ Deltas(int to_col, int to_row, int to_block, unsigned taps_h, unsigned taps_w) {
        const int back = to_col * (int)(taps_w - 1);
        col = to_col;
        row = to_row - back;
        block = to_block - back - to_row * (int)(taps_h - 1);
    }
};

// A walk over the slabs: blocks of channels, and in each the taps. The same for all threads.
struct Walk {
    Taps row, col;  // the tap's two bits
    Taps last_row, last_col;
    int channels;  // that are left, with those of this block
    Deltas of_a, of_b;
    int a, b;  // offsets of the slab in both operands, in elements

    // From slab `first` on.
    __device__ Walk(unsigned first, const Axis& rows, const Axis& cols, unsigned channels_, int a_col, int a_row,
                    int b_col, int b_row, int b_block)
        : last_row(tap_row(rows.taps - 1)),
          last_col(tap_col(cols.taps - 1)),
          of_a(a_col, a_row, BK, rows.taps, cols.taps),
          of_b(b_col, b_row, b_block, rows.taps, cols.taps) {
        const unsigned taps = max(rows.taps * cols.taps, 1);  // a class without taps has no slabs
        const unsigned block = first / taps, t = first % taps / max(cols.taps, 1), v = first % taps % max(cols.taps, 1);
        row = tap_row(t);
        col = tap_col(v);
        channels = (int)(channels_ - block * BK);
        a = (int)t * a_row + (int)v * a_col + (int)block * BK;
        b = (int)t * b_row + (int)v * b_col + (int)block * b_block;
    }

    __device__ __forceinline__ void advance() {
        if (col != last_col) {
            col <<= 1;
            a += of_a.col;
            b += of_b.col;
            return;
        }
        col = tap_col(0);
        if (row != last_row) {
            row <<= 1;
            a += of_a.row;
            b += of_b.row;
            return;
        }
        row = tap_row(0);
        channels -= BK;
        a += of_a.block;
        b += of_b.block;
    }
};

// Patches of an image batch (n, h, w, channels) as rows, contiguous along k for one tap.
template <int THREADS, int ROWS, Unit UNIT>
struct Patches {
    using P = Panel<THREADS, ROWS, BK>;
    const bf16* row[P::PASSES];
    Taps taps[P::PASSES];
    Places<P, BK> places;

    __device__ Patches(const bf16* from, const Pixel* pixels, unsigned h, unsigned w, const Axis& rows,
                       const Axis& cols)
        : places(0) {
#pragma unroll
        for (int i = 0; i < P::PASSES; ++i) {
            const Pixel& pixel = pixels[P::row() + i * P::STEP];
            row[i] = kept(from + pixel.patch + 8 * P::chunk());
            taps[i] = inside(pixel.i, pixel.j, rows.taps, cols.taps, h, w);
        }
    }

    __device__ __forceinline__ void bring(uint32_t slot, int at, Taps want, int count) const {
#pragma unroll
        for (int i = 0; i < P::PASSES; ++i) {
            const bf16* from = row[i] + at;
            const bool inside = (want & ~taps[i]) == 0;
#pragma unroll
            for (int j = 0; j < P::PIECES; ++j) {
                copy<UNIT>(slot + places.at(i, j), from + 32 * j, inside, count - 8 * P::chunk() - 32 * j);
            }
        }
    }
};

// a = patches of x, b = the weight's rows.
template <class TILE, Unit UNIT>
struct ForwardOperands {
    static constexpr bool A_ALONG_K = true, B_ALONG_K = true;
    static constexpr bool WRITTEN_OUT = UNIT == Unit::BLOCK;
    Patches<TILE::THREADS, TILE::BM, UNIT> a;
    AlongK<TILE::THREADS, TILE::BN, UNIT> b;
    Walk walk;

    __device__ ForwardOperands(const bf16* x, const bf16* weight, const Pixel* pixels, unsigned first_col,
                               const Geometry& g, const Axis& rows, const Axis& cols, unsigned first_slab)
        : a(x, pixels, g.h, g.w, rows, cols),
          b(TILE::A_BYTES, weight, first_col, g.c_out, (size_t)g.kh * g.kw * g.c_in),
          walk(first_slab, rows, cols, g.c_in, g.c_in, g.w * g.c_in, g.c_in, g.kw * g.c_in, BK) {}

    __device__ __forceinline__ void bring(uint32_t slot) {
        a.bring(slot, walk.a, walk.row | walk.col, walk.channels);
        b.bring(slot, walk.b, walk.channels);
        walk.advance();
    }
};

// a = patches of dy, b = for each tap and channel of y the weight's row of c_in elements.
template <class TILE, Unit UNIT>
struct DgradOperands {
    static constexpr bool A_ALONG_K = true, B_ALONG_K = false;
    static constexpr bool WRITTEN_OUT = UNIT == Unit::BLOCK;
    Patches<TILE::THREADS, TILE::BM, UNIT> a;
    AcrossK<TILE::THREADS, TILE::BN, UNIT, UNIT == Unit::BLOCK> b;
    Walk walk;

    __device__ DgradOperands(const bf16* dy, const bf16* weight, const Pixel* pixels, unsigned first_col,
                             const Geometry& g, const Axis& rows, const Axis& cols, unsigned first_slab)
        : a(dy, pixels, g.oh, g.ow, rows, cols),
          b(TILE::A_BYTES, weight + ((long long)rows.u * g.kw + cols.u) * g.c_in, first_col, g.c_in,
            (size_t)g.kh * g.kw * g.c_in),
          walk(first_slab, rows, cols, g.c_out, g.c_out, g.ow * g.c_out, cols.du * (int)g.c_in,
               rows.du * (int)(g.kw * g.c_in), BK * g.kh * g.kw * g.c_in) {}

    __device__ __forceinline__ void bring(uint32_t slot) {
        a.bring(slot, walk.a, walk.row | walk.col, walk.channels);
        b.bring(slot, walk.b, walk.channels);
        walk.advance();
    }
};

// Where the patch of a pixel of y begins in x, as a number of pixels, and which of its taps are inside.
struct Origin {
    int pixel;
    Taps taps;
};

// The origins of a slab's pixels, in four turns: those that are read, those of the next two slabs, and one turn that
// may still be read. Written by BK threads two slabs ahead, so that a barrier of the core lies between.
using OriginTable = Origin[4][BK];

// Host twin: bytes of the origins, behind the ring.
constexpr int ORIGINS = 2048;
static_assert(sizeof(OriginTable) == ORIGINS, "as the host gives");

// A pixel of y, or a step over the pixels of y, all images one after the other.
struct Place {
    unsigned image, row, col;

    __device__ Place(unsigned pixel, const Geometry& g)
        : image(pixel / (g.oh * g.ow)), row(pixel % (g.oh * g.ow) / g.ow), col(pixel % g.ow) {}

    __device__ __forceinline__ void advance(const Place& by, const Geometry& g) {
        col += by.col;
        row += by.row + (col >= g.ow);
        image += by.image + (row >= g.oh);
        col -= col >= g.ow ? g.ow : 0;
        row -= row >= g.oh ? g.oh : 0;
    }
};

// a = dy, b = patches of x with the columns (u, v, c_in); k = pixels of y.
template <class TILE, Unit UNIT>
struct WgradOperands {
    static constexpr bool A_ALONG_K = false, B_ALONG_K = false;
    static constexpr bool WRITTEN_OUT = UNIT == Unit::BLOCK;
    using P = Panel<TILE::THREADS, BK, TILE::BN>;
    AcrossK<TILE::THREADS, TILE::BM, UNIT, false> a;
    const bf16* x;
    OriginTable& origins;
    const Geometry& g;
    unsigned slab, first_col;
    int left;  // pixels from this slab on
    Place place, step;
    Places<P, TILE::BN> places;
    // Of the thread's chunks: where they are in a patch at the beginning of x, and their tap; every tap for what is no
    // column.
    const bf16* chunk[P::PIECES];
    Taps want[P::PIECES];

    // For pixels begin .. end. The caller must follow with a barrier.
    __device__ WgradOperands(const bf16* dy, const bf16* x_, OriginTable& origins_, const Geometry& g_,
                             unsigned first_row, unsigned first_col_, unsigned begin, unsigned end)
        : a(0, dy + (size_t)begin * g_.c_out, first_row, g_.c_out, g_.c_out),
          x(x_),
          origins(origins_),
          g(g_),
          slab(0),
          first_col(first_col_),
          left((int)(end - begin)),
          place(begin + threadIdx.x % BK, g_),
          step(BK, g_),
          places(TILE::A_BYTES) {
        for (unsigned ahead = 0; ahead < STAGES - 1; ++ahead) find_origins(ahead);
#pragma unroll
        for (int j = 0; j < P::PIECES; ++j) {
            int offset;
            column(8 * P::chunk() + 32 * j, offset, want[j]);
            chunk[j] = kept(x + offset);
        }
    }

    __device__ __forceinline__ void column(int col, int& offset, Taps& want) const {
        const unsigned tap_of = (first_col + col) / g.c_in, u = tap_of / g.kw, v = tap_of % g.kw;
        offset = (int)((u * g.w + v) * g.c_in + (first_col + col) % g.c_in);
        want = u < g.kh ? tap_row(u) | tap_col(v) : ~0u;
    }

    // Those of the slab `ahead` of this one, where the thread's `place` is. No tap of a pixel beyond the end is inside.
    __device__ __forceinline__ void find_origins(unsigned ahead) {
        if (threadIdx.x >= BK) return;
        const int i = (int)(place.row * g.stride) - (int)g.top, j = (int)(place.col * g.stride) - (int)g.left;
        const bool exists = (int)(threadIdx.x + ahead * BK) < left;
        origins[(slab + ahead) % 4][threadIdx.x] = {((int)(place.image * g.h) + i) * (int)g.w + j,
                                                    exists ? inside(i, j, g.kh, g.kw, g.h, g.w) : 0};
        place.advance(step, g);
    }

    __device__ __forceinline__ void bring(uint32_t slot) {
        a.bring(slot, 0, left);
        a.advance((size_t)BK * g.c_out);
#pragma unroll
        for (int i = 0; i < P::PASSES; ++i) {
            const Origin origin = origins[slab % 4][P::row() + i * P::STEP];
            const long long patch = (long long)origin.pixel * (int)g.c_in;
#pragma unroll
            for (int j = 0; j < P::PIECES; ++j) {
                const uint32_t to = slot + places.at(i, j);
                if (UNIT == Unit::ELEMENT) {
                    gather(to, x + patch, origin.taps, 8 * P::chunk() + 32 * j);
                } else {
                    copy_async(to, chunk[j] + patch, (want[j] & ~origin.taps) == 0);
                }
            }
        }
        find_origins(STAGES - 1);
        ++slab;
        left -= BK;
    }

    // A chunk whose elements may have different taps.
    __device__ __forceinline__ void gather(uint32_t to, const bf16* from, Taps taps, int col) const {
        unsigned e[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int offset;
            Taps want;
            column(col + i, offset, want);
            e[i] = (want & ~taps) == 0 ? *reinterpret_cast<const unsigned short*>(from + offset) : 0;
        }
        store_shared(to, make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16, e[6] | e[7] << 16));
    }
};

// What the epilogue adds; null for none.
struct Plus {
    const float* bias;
    const bf16* shift;
    const bf16* residual;
};

// Four neighbouring sums of the pixel whose results begin at offset `result`, plus what there is to add.
__device__ __forceinline__ float4 finished(float4 v, const Four& four, const Plus& plus, unsigned image, size_t result,
                                           unsigned cols) {
    if (plus.bias) v = v + four.read(plus.bias + four.col);
    if (plus.shift) v = v + four.read(plus.shift + (size_t)image * cols + four.col);
    if (plus.residual) v = v + four.read(plus.residual + result + four.col);
    return v;
}

// The block's part of a sum over `slabs` slabs: one of the segments, or all if no other block has the tile.
struct Part {
    unsigned first, slabs;

    __device__ Part(unsigned slabs_, unsigned segment)
        : first(blockIdx.z * segment), slabs(gridDim.z > 1 ? min(segment, slabs_ - first) : slabs_) {}
};

// sum += the block's part of the product. If SEGMENTED, each segment is summed from zero.
template <class TILE, bool SEGMENTED, class OPERANDS>
__device__ __forceinline__ void multiply_part(uint32_t ring, OPERANDS& operands, const Part& part, unsigned segment,
                                              int steps, Accumulators<TILE>& sum) {
    if (SEGMENTED) {
        Accumulators<TILE> acc;
        multiply(ring, operands, part.slabs, steps, acc, segment, [&] { sum.take(acc); });
    } else {
        multiply(ring, operands, part.slabs, steps, sum, 0, [] {});
    }
}

// The positions of the tile's pixels, at the end of the ring: there they are read before the last slot is first
// written, and again when the results leave through the ring's beginning.
template <class TILE>
__device__ __forceinline__ Pixel* pixels_in(unsigned char* ring) {
    static_assert(TILE::THREADS == TILE::BM, "each thread finds one pixel");
    static_assert(4 * TILE::BM * TILE::BN + sizeof(Pixel) * TILE::BM <= TILE::RING, "beside the results");
    static_assert(sizeof(Pixel) * TILE::BM <= TILE::SLOT, "within the last slot");
    return reinterpret_cast<Pixel*>(ring + TILE::RING) - TILE::BM;
}

// Stores the tile whose first row is pixel `first` of `count`, plus `plus`; or, if the block has one of several
// segments, its sums to that segment's row of `parts` (segments, len).
template <class TILE>
__device__ __forceinline__ void store_pixels(bf16* to, float* parts, size_t len, unsigned char* ring,
                                             const Pixel* pixels, unsigned first, unsigned count, unsigned first_col,
                                             unsigned cols, const Plus& plus, const Accumulators<TILE>& acc) {
    each_four(reinterpret_cast<float*>(ring), acc, [&](int row, int col, float4 v) {
        const Four four(first_col + col, cols);
        if (four.count == 0 || first + row >= count) return;
        const Pixel& pixel = pixels[row];
        if (gridDim.z > 1) {
            four.write(parts + blockIdx.z * len + pixel.result + four.col, v);
        } else {
            four.write(to + pixel.result + four.col, finished(v, four, plus, pixel.image, pixel.result, cols));
        }
    });
}

template <class TILE, Unit UNIT, bool SEGMENTED>
__device__ __forceinline__ void forward(bf16* y, float* parts, const bf16* x, const bf16* weight, const Plus& plus,
                                        const Geometry& g, unsigned segment) {
    extern __shared__ __align__(1024) unsigned char ring[];
    Pixel* pixels = pixels_in<TILE>(ring);
    const unsigned count = g.n * g.oh * g.ow, across = (g.c_out + TILE::BN - 1) / TILE::BN;
    const unsigned first = blockIdx.x / across * TILE::BM, first_col = blockIdx.x % across * TILE::BN;
    const Axis rows = Axis::forward(g.kh, g.stride, g.top), cols = Axis::forward(g.kw, g.stride, g.left);
    pixels[threadIdx.x] = pixel_of_y(first + threadIdx.x, g, rows, cols);
    __syncthreads();  // pixels written above are read by the operands

    const Part part((g.c_in + BK - 1) / BK * g.kh * g.kw, segment);
    ForwardOperands<TILE, UNIT> operands(x, weight, pixels, first_col, g, rows, cols, part.first);
    Accumulators<TILE> sum;
    multiply_part<TILE, SEGMENTED>(shared_address(ring), operands, part, segment, steps_of<UNIT>(g.c_in), sum);
    pixels[threadIdx.x] = pixel_of_y(first + threadIdx.x, g, rows, cols);  // read behind a barrier of each_four
    store_pixels(y, parts, (size_t)count * g.c_out, ring, pixels, first, count, first_col, g.c_out, plus, sum);
}

template <class TILE, Unit UNIT, bool SEGMENTED>
__device__ __forceinline__ void dgrad(bf16* dx, float* parts, const bf16* dy, const bf16* weight, const Geometry& g,
                                      unsigned segment) {
    extern __shared__ __align__(1024) unsigned char ring[];
    Pixel* pixels = pixels_in<TILE>(ring);
    const Class of(blockIdx.y, g);
    const unsigned across = (g.c_in + TILE::BN - 1) / TILE::BN;
    const unsigned first = blockIdx.x / across * TILE::BM, first_col = blockIdx.x % across * TILE::BN;
    if (first >= of.count) return;
    const Axis rows = Axis::backward(of.above, g.kh, g.stride, g.top);
    const Axis cols = Axis::backward(of.before, g.kw, g.stride, g.left);
    pixels[threadIdx.x] = of.pixel(first + threadIdx.x, g, rows, cols);
    __syncthreads();  // pixels written above are read by the operands

    const Part part((g.c_out + BK - 1) / BK * rows.taps * cols.taps, segment);
    DgradOperands<TILE, UNIT> operands(dy, weight, pixels, first_col, g, rows, cols, part.first);
    Accumulators<TILE> sum;
    multiply_part<TILE, SEGMENTED>(shared_address(ring), operands, part, segment, steps_of<UNIT>(g.c_out), sum);
    pixels[threadIdx.x] = of.pixel(first + threadIdx.x, g, rows, cols);  // read behind a barrier of each_four
    const size_t len = (size_t)g.n * g.h * g.w * g.c_in;
    store_pixels(dx, parts, len, ring, pixels, first, of.count, first_col, g.c_in, Plus{}, sum);
}

// Writes `dw` if one segment has all pixels, otherwise each segment's partial sums to (segments, c_out, kh, kw, c_in).
template <class TILE, Unit UNIT>
__device__ __forceinline__ void wgrad(float* dw, const bf16* x, const bf16* dy, const Geometry& g, unsigned segment,
                                      bool add) {
    extern __shared__ __align__(1024) unsigned char ring[];
    OriginTable& origins = *reinterpret_cast<OriginTable*>(ring + TILE::RING);
    const unsigned count = g.n * g.oh * g.ow, width = g.kh * g.kw * g.c_in;
    const unsigned across = (width + TILE::BN - 1) / TILE::BN;
    const unsigned first = blockIdx.x / across * TILE::BM, first_col = blockIdx.x % across * TILE::BN;
    const unsigned begin = blockIdx.y * segment, end = min(begin + segment, count);

    WgradOperands<TILE, UNIT> operands(dy, x, origins, g, first, first_col, begin, end);
    __syncthreads();  // the first slabs' origins written above are read below; the core's barriers order the others
    Accumulators<TILE> acc;
    multiply(shared_address(ring), operands, (end - begin + BK - 1) / BK, BK / 16, acc, 0, [] {});
    store_tile(dw + (size_t)blockIdx.y * g.c_out * width, ring, first, g.c_out, first_col, width, add, acc);
}

}  // namespace mma
