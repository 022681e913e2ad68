// The convolution's products on tensor cores (tile_mma.cuh): how each gathers its slabs.
//
// k          fwd, dgrad  a slab is one tap's next 64 channels (fewer at the end: zeros). All taps of a block of 64 come
//                        first, then those of the next: taps read the same pixels, while these are in the caches. If
//                        the channels are in two tensors, the blocks of the first come first. Where the tensors and
//                        the taps are is found once and lies in shared memory (Plan). From slab to slab one offset, a
//                        tap's, is added to the addresses of all rows (Walk), which needs no division; only a new
//                        tensor makes new addresses. Whether a row's pixel is inside the image is one test of two
//                        packed masks (Taps)
//            wgrad       a slab is 64 pixels of y; their places in x and their masks are found two slabs ahead, by one
//                        thread each, also without division (Origins)
// segments   a layer of few pixels has its k cut into segments of whole slabs, by its shape alone: each is summed from
//            zero, then the segments' sums are added in order. In a product with few tiles each segment has blocks of
//            its own (blockIdx.z), and conv2d_join_segments adds up; in others a block goes through all of them. Either
//            way the bits are the same, so that an image's do not depend on its batch
// host       kh, kw < 16, of repeated pixels < 8; kh w c, kh kw c_in c_out < 2^31, with the c and w of the image that
//            is gathered from; behind the ring: 4 BM + 4 BN + SOURCES bytes of shared memory and TAP for each tap of
//            each tensor (fwd, dgrad; in dgrad of repeated pixels four times as many taps), or ORIGINS (wgrad)
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

// Those of the taps of `axis` at `from` that are inside an image of `len` rows, each repeated if so: bits 0 .. taps.
__device__ __forceinline__ unsigned inside(const Axis& axis, int from, unsigned len) {
    const unsigned once = inside(from, axis.turn, len << axis.up);
    return axis.taps == axis.turn ? once : once | inside(from + 1, axis.turn, len) << axis.turn;
}

// One of the image batches whose channels are summed over, one after the other, with its weights.
struct Source {
    const bf16 *from, *weight;  // pixel 0; the weight's first row and tap
    // Those that are read together lie together: nvcc loads across a gap with a pragma of PTX 8.3.
    unsigned first, end;  // its taps are taps[first .. end]
    int channels;
    int b_pitch, a_pitch;  // bytes from one row of the weight to the next, and from one pixel
    unsigned unused;
};

// One of its taps: how many elements further on than the first it is in an image, and than the weight's row begins.
struct Tap {
    int a, b;
    Taps want;
    int unused;  // so that one access reads it
};

// Host twin: bytes of the sources in a plan.
constexpr int SOURCES = 160;

// Host twin: bytes of each tap in a plan.
constexpr int TAP = 16;

// What a block of fwd or dgrad sums over, in shared memory behind the ring, written before the first slab.
template <class TILE>
struct Plan {
    int patch[TILE::BM];  // of each row of the tile: the index of its first tap's pixel
    int row[TILE::BN];    // of each column: the row of the weight
    Source sources[SOURCES / sizeof(Source)];
    Tap taps[1];  // as many as there are

    __device__ static Plan& behind(unsigned char* ring) { return *reinterpret_cast<Plan*>(ring + TILE::RING); }
};
static_assert(sizeof(Tap) == TAP && SOURCES % sizeof(Source) == 0, "as the host gives");

// The element `count` times `pitch` bytes further on.
__device__ __forceinline__ const bf16* further(const bf16* p, int count, int pitch) {
    return reinterpret_cast<const bf16*>(reinterpret_cast<const char*>(p) + (long long)count * pitch);
}

// A walk over the slabs: the sources, in each the blocks of channels, and in each block the taps. The same for all
// threads.
template <class TILE, bool B_ALONG_K>
struct Walk {
    const Plan<TILE>& plan;
    unsigned source, sources;
    unsigned at, first, end;  // the tap, those of the source
    int channels;             // that are left in the source, with those of this block
    int a, b, b_step;         // offsets of the block in both operands, in elements; in b from block to block
    Tap tap;

    // From slab `slab` on.
    __device__ Walk(const Plan<TILE>& plan_, unsigned sources_, unsigned slab)
        : plan(plan_), source(0), sources(sources_) {
        open();
        for (unsigned all; slab >= (all = (channels + BK - 1) / BK * (end - first)) && source + 1 < sources;) {
            slab -= all;
            ++source;
            open();
        }
        const unsigned taps = max(end - first, 1);  // a class without taps has no slabs
        const int block = (int)(slab / taps);
        channels -= block * BK;
        a = block * BK;
        b = block * b_step;
        at = first + slab % taps;
        tap = plan.taps[at];
    }

    __device__ __forceinline__ void open() {
        const Source& of = plan.sources[source];
        channels = of.channels;
        at = first = of.first;
        end = of.end;
        a = b = 0;
        b_step = B_ALONG_K ? BK : BK * (of.b_pitch / (int)sizeof(bf16));
    }

    // True if what follows is of another source.
    __device__ __forceinline__ bool advance() {
        bool other = false;
        if (++at == end) {
            at = first;
            channels -= BK;
            a += BK;
            b += b_step;
            if (channels <= 0 && source + 1 < sources) {
                ++source;
                open();
                other = true;
            }
        }
        tap = plan.taps[at];
        return other;
    }
};

// Patches of an image batch as rows, contiguous along k for one tap.
template <class TILE, Unit UNIT>
struct Patches {
    using P = Panel<TILE::THREADS, TILE::BM, BK>;
    const bf16* row[P::PASSES];
    Taps taps[P::PASSES];
    Places<P, BK> places;

    // Of images of h x w.
    __device__ Patches(const Pixel* pixels, unsigned h, unsigned w, const Axis& rows, const Axis& cols) : places(0) {
#pragma unroll
        for (int i = 0; i < P::PASSES; ++i) {
            const Pixel& pixel = pixels[P::row() + i * P::STEP];
            taps[i] = inside(rows, pixel.i, h) | inside(cols, pixel.j, w) << 16;
        }
    }

    // From here on the rows are those of `source`.
    __device__ __forceinline__ void open(const Plan<TILE>& plan, const Source& source) {
        const bf16* from = source.from + 8 * P::chunk();
#pragma unroll
        for (int i = 0; i < P::PASSES; ++i) {
            row[i] = kept(further(from, plan.patch[P::row() + i * P::STEP], source.a_pitch));
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

// Rows of a weight, contiguous along k for one tap.
template <class TILE, Unit UNIT>
struct WeightRows {
    using P = Panel<TILE::THREADS, TILE::BN, BK>;
    const bf16* row[P::PASSES];
    Places<P, BK> places;

    __device__ WeightRows() : places(TILE::A_BYTES) {}

    // From here on the rows are those of `source`.
    __device__ __forceinline__ void open(const Plan<TILE>& plan, const Source& source) {
        if (!P::busy()) return;
        const bf16* from = source.weight + 8 * P::chunk();
#pragma unroll
        for (int i = 0; i < P::PASSES; ++i) {
            row[i] = kept(further(from, plan.row[P::row() + i * P::STEP], source.b_pitch));
        }
    }

    __device__ __forceinline__ void bring(uint32_t slot, int at, int count) const {
        if (!P::busy()) return;
#pragma unroll
        for (int i = 0; i < P::PASSES; ++i) {
            const bf16* from = row[i] + at;
#pragma unroll
            for (int j = 0; j < P::PIECES; ++j) {
                copy<UNIT>(slot + places.at(i, j), from + 32 * j, true, count - 8 * P::chunk() - 32 * j);
            }
        }
    }
};

// a = patches of the sources, b = the rows of their weights.
template <class TILE, Unit UNIT>
struct ForwardOperands {
    static constexpr bool A_ALONG_K = true, B_ALONG_K = true;
    static constexpr bool WRITTEN_OUT = UNIT == Unit::BLOCK;
    Walk<TILE, true> walk;
    Patches<TILE, UNIT> a;
    WeightRows<TILE, UNIT> b;

    __device__ ForwardOperands(const Plan<TILE>& plan, unsigned sources, const Pixel* pixels, const Geometry& g,
                               const Axis& rows, const Axis& cols, unsigned first_slab)
        : walk(plan, sources, first_slab), a(pixels, g.h, g.w, rows, cols) {
        open();
    }

    __device__ __forceinline__ void open() {
        const Source& source = walk.plan.sources[walk.source];
        a.open(walk.plan, source);
        b.open(walk.plan, source);
    }

    __device__ __forceinline__ void bring(uint32_t slot) {
        a.bring(slot, walk.a + walk.tap.a, walk.tap.want, walk.channels);
        b.bring(slot, walk.b + walk.tap.b, walk.channels);
        if (walk.advance()) open();
    }
};

// a = patches of dy, b = for each tap and channel of y the weight's row of c_in elements.
template <class TILE, Unit UNIT>
struct DgradOperands {
    static constexpr bool A_ALONG_K = true, B_ALONG_K = false;
    static constexpr bool WRITTEN_OUT = UNIT == Unit::BLOCK;
    Walk<TILE, false> walk;
    Patches<TILE, UNIT> a;
    AcrossK<TILE::THREADS, TILE::BN, UNIT, UNIT == Unit::BLOCK> b;

    __device__ DgradOperands(const Plan<TILE>& plan, const Pixel* pixels, const bf16* weight, unsigned first_col,
                             const Geometry& g, const Axis& rows, const Axis& cols, unsigned first_slab)
        : walk(plan, 1, first_slab),
          a(pixels, g.oh, g.ow, rows, cols),
          b(TILE::A_BYTES, weight, first_col, g.c_in, (size_t)g.kh * g.kw * g.c_in) {
        a.open(plan, plan.sources[0]);
    }

    __device__ __forceinline__ void bring(uint32_t slot) {
        a.bring(slot, walk.a + walk.tap.a, walk.tap.want, walk.channels);
        b.bring(slot, walk.b + walk.tap.b, walk.channels);
        walk.advance();
    }
};

// Where the patch of a pixel of y begins in x, as a number of pixels, and which of its taps are inside. If the pixels
// of x are repeated, ODD of the row (column) is set where the first tap is the second of two rows (columns) of one
// pixel.
struct Origin {
    int pixel;
    Taps taps;
};
constexpr unsigned ODD = 1u << 15;

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

// The columns of a tile of dw: (u, v, channel), of the first tensor of x, or of the second, whose tiles come after
// those of the first.
struct Columns {
    const bf16* x;
    unsigned channels, width;  // of this tensor; its columns
    unsigned first;            // of the tile
    unsigned before;           // channels of x before those of this tensor

    __device__ Columns(unsigned tile, unsigned bn, const bf16* x_, const bf16* x_second, const Geometry& g)
        : x(x_), channels(g.c_first), width(g.kh * g.kw * g.c_first), first(tile * bn), before(0) {
        const unsigned tiles = (width + bn - 1) / bn;
        if (tile < tiles) return;
        x = x_second;
        channels = g.c_in - g.c_first;
        width = g.kh * g.kw * channels;
        first = (tile - tiles) * bn;
        before = g.c_first;
    }

    __device__ static unsigned tiles(unsigned bn, const Geometry& g) {
        const unsigned taps = g.kh * g.kw;
        return (taps * g.c_first + bn - 1) / bn + (taps * (g.c_in - g.c_first) + bn - 1) / bn;
    }

    // Where column `col` is in a row of dw (kh, kw, c_in).
    __device__ __forceinline__ unsigned place(unsigned col, unsigned c_in) const {
        return channels == c_in ? col : col / channels * c_in + before + col % channels;
    }
};

// a = dy, b = patches of x with the tile's columns; k = pixels of y.
template <class TILE, Unit UNIT_X, Unit UNIT_DY>
struct WgradOperands {
    static constexpr bool A_ALONG_K = false, B_ALONG_K = false;
    static constexpr bool WRITTEN_OUT = UNIT_X == Unit::BLOCK;
    using P = Panel<TILE::THREADS, BK, TILE::BN>;
    AcrossK<TILE::THREADS, TILE::BM, UNIT_DY, false> a;
    const Columns& columns;
    OriginTable& origins;
    const Geometry& g;
    unsigned slab;
    int left;  // pixels from this slab on
    Place place, step;
    Places<P, TILE::BN> places;
    // Of the thread's chunks: where they are in a patch at the beginning of x, and their tap; every tap for what is no
    // column. If the pixels of x are repeated, ODD of the tap's row (column) is set where that is odd: it then is one
    // row (column) of x further on in a patch that begins ODD.
    const bf16* chunk[P::PIECES];
    Taps want[P::PIECES];

    // For pixels begin .. end. The caller must follow with a barrier.
    __device__ WgradOperands(const bf16* dy, const Columns& columns_, OriginTable& origins_, const Geometry& g_,
                             unsigned first_row, unsigned begin, unsigned end)
        : a(0, dy + (size_t)begin * g_.c_out, first_row, g_.c_out, g_.c_out),
          columns(columns_),
          origins(origins_),
          g(g_),
          slab(0),
          left((int)(end - begin)),
          place(begin + threadIdx.x % BK, g_),
          step(BK, g_),
          places(TILE::A_BYTES) {
        for (unsigned ahead = 0; ahead < STAGES - 1; ++ahead) find_origins(ahead);
#pragma unroll
        for (int j = 0; j < P::PIECES; ++j) {
            int offset;
            column(8 * P::chunk() + 32 * j, offset, want[j]);
            chunk[j] = kept(columns.x + offset);
        }
    }

    __device__ __forceinline__ void column(int col, int& offset, Taps& want) const {
        const unsigned c = columns.channels, tap_of = (columns.first + col) / c, u = tap_of / g.kw, v = tap_of % g.kw;
        offset = (int)(((u >> g.up) * g.w + (v >> g.up)) * c + (columns.first + col) % c);
        want = u < g.kh ? tap_row(u) | tap_col(v) : ~0u;
    }

    // Those of the slab `ahead` of this one, where the thread's `place` is. No tap of a pixel beyond the end is inside.
    __device__ __forceinline__ void find_origins(unsigned ahead) {
        if (threadIdx.x >= BK) return;
        const int i = (int)(place.row * g.stride) - (int)g.top, j = (int)(place.col * g.stride) - (int)g.left;
        const bool exists = (int)(threadIdx.x + ahead * BK) < left;
        const Taps rows = inside(i, g.kh, g.h << g.up) | (i & g.up) * ODD;
        const Taps cols = inside(j, g.kw, g.w << g.up) | (j & g.up) * ODD;
        origins[(slab + ahead) % 4][threadIdx.x] = {Pixel{place.image, i, j, 0}.patch(g.h, g.w, g.up),
                                                    exists ? rows | cols << 16 : 0};
        place.advance(step, g);
    }

    // Pixels of x by which a tap of odd row or column is further on in a patch that begins ODD.
    __device__ __forceinline__ int odd_step(Taps want, Taps taps) const {
        const bool row = taps & ODD && want & 0xaaaau, col = taps & ODD << 16 && want & 0xaaaau << 16;
        return (row ? (int)g.w : 0) + (col ? 1 : 0);
    }

    template <bool UP>
    __device__ __forceinline__ void bring_patches(uint32_t slot) const {
#pragma unroll
        for (int i = 0; i < P::PASSES; ++i) {
            const Origin origin = origins[slab % 4][P::row() + i * P::STEP];
            const int pitch = (int)(columns.channels * sizeof(bf16));
#pragma unroll
            for (int j = 0; j < P::PIECES; ++j) {
                const uint32_t to = slot + places.at(i, j);
                if (UNIT_X == Unit::ELEMENT) {
                    gather(to, origin, 8 * P::chunk() + 32 * j);
                } else {
                    const int pixel = origin.pixel + (UP ? odd_step(want[j], origin.taps) : 0);
                    copy_async(to, further(chunk[j], pixel, pitch), (want[j] & ~origin.taps) == 0);
                }
            }
        }
    }

    __device__ __forceinline__ void bring(uint32_t slot) {
        a.bring(slot, 0, left);
        a.advance((size_t)BK * g.c_out);
        if (UNIT_X != Unit::ELEMENT && g.up) {
            bring_patches<true>(slot);
        } else {
            bring_patches<false>(slot);
        }
        find_origins(STAGES - 1);
        ++slab;
        left -= BK;
    }

    // A chunk whose elements may have different taps.
    __device__ __forceinline__ void gather(uint32_t to, const Origin& origin, int col) const {
        const int pitch = (int)(columns.channels * sizeof(bf16));
        unsigned e[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            int offset;
            Taps want;
            column(col + i, offset, want);
            const int pixel = origin.pixel + odd_step(want, origin.taps);
            const bf16* from = further(columns.x + offset, pixel, pitch);
            e[i] = (want & ~origin.taps) == 0 ? *reinterpret_cast<const unsigned short*>(from) : 0;
        }
        store_shared(to, make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16, e[6] | e[7] << 16));
    }
};

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
// segments, its sums to that segment's rows of `parts` (segments, results, cols).
template <class TILE>
__device__ __forceinline__ void store_pixels(const Results<bf16>& to, float* parts, size_t results,
                                             unsigned char* ring, const Pixel* pixels, unsigned first, unsigned count,
                                             unsigned first_col, const Plus<bf16>& plus,
                                             const Accumulators<TILE>& acc) {
    each_four(reinterpret_cast<float*>(ring), acc, [&](int row, int col, float4 v) {
        const Four four(first_col + col, to.cols);
        if (four.count == 0 || first + row >= count) return;
        const Pixel& pixel = pixels[row];
        if (gridDim.z > 1) {
            four.write(parts + (blockIdx.z * results + pixel.result) * to.cols + four.col, v);
        } else {
            to.write(pixel.result, four, plus.to(v, four, pixel.image, pixel.result, to.cols));
        }
    });
}

// Writes a plan, source by source. All threads call it; no channels make no source.
template <class TILE>
struct Writer {
    Plan<TILE>& plan;
    unsigned sources, taps, slabs;  // that have been written

    __device__ explicit Writer(Plan<TILE>& plan_) : plan(plan_), sources(0), taps(0), slabs(0) {}

    // All taps of a convolution, over images of rows of w pixels, in the weight (rows, kh, kw, c_in).
    __device__ __forceinline__ void add(const bf16* from, unsigned channels, unsigned w, const bf16* weight,
                                        const Geometry& g, const Axis& rows, const Axis& cols) {
        const unsigned count = rows.taps * cols.taps;
        if (channels == 0) return;
        for (unsigned e = threadIdx.x; e < count; e += TILE::THREADS) {
            const unsigned t = e / cols.taps, v = e % cols.taps;
            plan.taps[taps + e] = {(int)((rows.offset(t) * w + cols.offset(v)) * channels),
                                   (rows.tap(t) * (int)g.kw + cols.tap(v)) * (int)g.c_in, tap_row(t) | tap_col(v), 0};
        }
        if (count == 0 && threadIdx.x == 0) plan.taps[taps] = {};  // read, but not used
        write(from, channels, weight, g.kh * g.kw * g.c_in, count);
    }

    // The pixel of y alone, which is tap (top, left).
    __device__ __forceinline__ void add_pixel(const bf16* from, unsigned channels, const bf16* weight,
                                              const Geometry& g) {
        if (channels == 0) return;
        if (threadIdx.x == 0) {
            plan.taps[taps] = {(int)((g.top * g.w + g.left) * channels), 0, tap_row(g.top) | tap_col(g.left), 0};
        }
        write(from, channels, weight, g.s_in, 1);
    }

    __device__ __forceinline__ void write(const bf16* from, unsigned channels, const bf16* weight, unsigned pitch,
                                          unsigned count) {
        if (threadIdx.x == 0) {
            Source& source = plan.sources[sources];
            source.from = from;
            source.weight = weight;
            source.channels = (int)channels;
            source.a_pitch = (int)(channels * sizeof(bf16));
            source.b_pitch = (int)(pitch * sizeof(bf16));
            source.first = taps;
            source.end = taps + count;
        }
        ++sources;
        taps += count;
        slabs += count * ((channels + BK - 1) / BK);
    }
};

// Writes what the rows and columns of a tile are: `pixel` of the thread, and c_out rows of the weight.
template <class TILE>
__device__ __forceinline__ void write_rows(Plan<TILE>& plan, const Pixel& pixel, unsigned h, unsigned w, unsigned up,
                                           unsigned first_col, unsigned c_out) {
    plan.patch[threadIdx.x] = pixel.patch(h, w, up);
    // Rows beyond the last repeat it: they are multiplied but not stored, which costs no test.
    for (unsigned r = threadIdx.x; r < TILE::BN; r += TILE::THREADS) plan.row[r] = (int)min(first_col + r, c_out - 1);
}

// A 1x1 convolution that is added to y: of s, one tensor or two as x, with weight (c_out, s_in).
struct Shortcut {
    const bf16 *s, *s_second, *weight;
};

template <class TILE, Unit UNIT, bool SEGMENTED>
__device__ __forceinline__ void forward(bf16* y, float* parts, const bf16* x, const bf16* x_second, const bf16* weight,
                                        const Shortcut& shortcut, const Plus<bf16>& plus, const Geometry& g,
                                        unsigned segment) {
    extern __shared__ __align__(1024) unsigned char ring[];
    Pixel* pixels = pixels_in<TILE>(ring);
    Plan<TILE>& plan = Plan<TILE>::behind(ring);
    const Class of(blockIdx.y, 1 + g.up, g.n, g.oh, g.ow);
    const unsigned across = (g.c_out + TILE::BN - 1) / TILE::BN;
    const unsigned first = blockIdx.x / across * TILE::BM, first_col = blockIdx.x % across * TILE::BN;
    const Axis rows = Axis::forward(g.kh, g.stride, g.top, g.up, of.above);
    const Axis cols = Axis::forward(g.kw, g.stride, g.left, g.up, of.before);
    const Pixel own = of.pixel(first + threadIdx.x, rows, cols);
    pixels[threadIdx.x] = own;
    write_rows(plan, own, g.h, g.w, g.up, first_col, g.c_out);
    const unsigned others = g.c_in - g.c_first, s_others = g.s_in - g.s_first;
    Writer<TILE> writer(plan);
    writer.add(x, g.c_first, g.w, weight, g, rows, cols);
    writer.add(x_second, others, g.w, weight + g.c_first, g, rows, cols);
    writer.add_pixel(shortcut.s, g.s_first, shortcut.weight, g);
    writer.add_pixel(shortcut.s_second, s_others, shortcut.weight + g.s_first, g);
    __syncthreads();  // the plan and the pixels written above are read by the operands

    const Part part(writer.slabs, segment);
    ForwardOperands<TILE, UNIT> operands(plan, writer.sources, pixels, g, rows, cols, part.first);
    Accumulators<TILE> sum;
    const int steps = steps_of<UNIT>(max(max(g.c_first, others), max(g.s_first, s_others)));
    multiply_part<TILE, SEGMENTED>(shared_address(ring), operands, part, segment, steps, sum);
    pixels[threadIdx.x] = of.pixel(first + threadIdx.x, rows, cols);  // read behind a barrier of each_four
    store_pixels({y, nullptr, g.c_out, g.c_out}, parts, (size_t)g.n * g.oh * g.ow, ring, pixels, first, of.count,
                 first_col, plus, sum);
}

template <class TILE, Unit UNIT, bool SEGMENTED>
__device__ __forceinline__ void dgrad(bf16* dx, bf16* dx_second, float* parts, const bf16* dy, const bf16* weight,
                                      const Geometry& g, unsigned segment) {
    extern __shared__ __align__(1024) unsigned char ring[];
    Pixel* pixels = pixels_in<TILE>(ring);
    Plan<TILE>& plan = Plan<TILE>::behind(ring);
    const Class of(blockIdx.y, g.stride, g.n, g.h, g.w);
    const unsigned across = (g.c_in + TILE::BN - 1) / TILE::BN;
    const unsigned first = blockIdx.x / across * TILE::BM, first_col = blockIdx.x % across * TILE::BN;
    if (first >= of.count) return;
    const Axis rows = Axis::backward(of.above, g.kh, g.stride, g.top, g.up);
    const Axis cols = Axis::backward(of.before, g.kw, g.stride, g.left, g.up);
    const Pixel own = of.pixel(first + threadIdx.x, rows, cols);
    pixels[threadIdx.x] = own;
    write_rows(plan, own, g.oh, g.ow, 0, 0, 1);
    Writer<TILE> writer(plan);
    writer.add(dy, g.c_out, g.ow, weight, g, rows, cols);
    __syncthreads();  // the plan and the pixels written above are read by the operands

    const Part part(writer.slabs, segment);
    DgradOperands<TILE, UNIT> operands(plan, pixels, weight, first_col, g, rows, cols, part.first);
    Accumulators<TILE> sum;
    multiply_part<TILE, SEGMENTED>(shared_address(ring), operands, part, segment, steps_of<UNIT>(g.c_out), sum);
    pixels[threadIdx.x] = of.pixel(first + threadIdx.x, rows, cols);  // read behind a barrier of each_four
    store_pixels({dx, dx_second, g.c_first, g.c_in}, parts, (size_t)g.n * g.h * g.w, ring, pixels, first, of.count,
                 first_col, Plus<bf16>{}, sum);
}

// Writes `dw` if one segment has all pixels, otherwise each segment's partial sums to (segments, c_out, kh, kw, c_in).
template <class TILE, Unit UNIT_X, Unit UNIT_DY = UNIT_X>
__device__ __forceinline__ void wgrad(float* dw, const bf16* x, const bf16* x_second, const bf16* dy,
                                      const Geometry& g, unsigned segment, bool add) {
    extern __shared__ __align__(1024) unsigned char ring[];
    OriginTable& origins = *reinterpret_cast<OriginTable*>(ring + TILE::RING);
    const unsigned count = g.n * g.oh * g.ow, width = g.kh * g.kw * g.c_in;
    const unsigned across = Columns::tiles(TILE::BN, g);
    const unsigned first = blockIdx.x / across * TILE::BM;
    const Columns columns(blockIdx.x % across, TILE::BN, x, x_second, g);
    const unsigned begin = blockIdx.y * segment, end = min(begin + segment, count);

    WgradOperands<TILE, UNIT_X, UNIT_DY> operands(dy, columns, origins, g, first, begin, end);
    __syncthreads();  // the first slabs' origins written above are read below; the core's barriers order the others
    Accumulators<TILE> acc;
    multiply(shared_address(ring), operands, (end - begin + BK - 1) / BK, BK / 16, acc, 0, [] {});
    dw += (size_t)blockIdx.y * g.c_out * width;
    each_four(reinterpret_cast<float*>(ring), acc, [&](int row, int col, float4 v) {
        // Four neighbours stay together unless the channels do not divide by four.
        Four four(columns.first + col, columns.width);
        if (four.count == 0 || first + row >= g.c_out) return;
        float* to = dw + (size_t)(first + row) * width;
        if (columns.channels == g.c_in || (columns.channels % 4 == 0 && g.c_in % 4 == 0)) {
            to += columns.place(four.col, g.c_in);
            four.write(to, add ? four.read(to) + v : v);
        } else {
            const float e[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                if (i >= four.count) break;
                float* at = to + columns.place(four.col + i, g.c_in);
                *at = add ? *at + e[i] : e[i];
            }
        }
    });
}

}  // namespace mma
