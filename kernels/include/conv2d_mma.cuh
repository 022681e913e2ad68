// The convolution's products on tensor cores (tile_mma.cuh): how each gathers its slabs.
//
// k          fwd, dgrad  a slab is one tap's next 64 channels (fewer at the end: zeros). All taps of a block of 64 come
//                        first, then those of the next: taps read the same pixels, while these are in the caches. If
//                        the channels are in two tensors, the blocks of the first come first; those of a shortcut,
//                        which have one tap, come last. Where the tensors and
//                        the taps are is found once and lies in shared memory (Plan). From slab to slab one offset, a
//                        tap's, is added to the addresses of all rows (Walk), which needs no division; only a new
//                        tensor makes new addresses. Whether a row's pixel is inside the image is one test of two
//                        packed masks (Taps)
//            wgrad       a slab is 64 pixels of y. In images of at most 32x32 pixels whose sides are powers of two,
//                        all rows go on by one step from slab to slab, and a mask says in which slabs the tile's tap is
//                        inside (SteadyWgradOperands). In others the pixels' places in x and their masks are found two
//                        slabs ahead, by one thread each, also without division (WgradOperands)
// backward   one launch computes dw and dx, and of a shortcut both gradients, since all four take the same dy: it comes
//            from memory once, and the blocks of one product fill the waves of the others. Which tile of which product
//            a block has depends on blockIdx.x alone (BackwardBlocks); its main loop is that of this product. The
//            blocks of dw have the most steps of k, so they come first:
//
//                blockIdx.x   blocks of dw      blocks of dx     the others
//                             dw, dw of s       dx               dx of s
//                rows         c_out             pixels of x      pixels of x
//                cols         (u,v,c_in), s_in  c_in             s_in
//                k            pixels of y       (u,v,c_out)      c_out
//
//            The blocks of the first columns of dw sum dy over their pixels, too: bias gradients take no pass over dy
// segments   a layer of few pixels has its k cut into segments of whole slabs, by its shape alone: each is summed from
//            zero, then the segments' sums are added in order. In a product with few tiles each segment has blocks of
//            its own (blockIdx.z), and conv2d_join_segments adds up; in others a block goes through all of them. Either
//            way the bits are the same, so that an image's do not depend on its batch
// host       kh, kw < 16, of repeated pixels < 8; at most 120 taps in a plan: kh kw of each tensor, one of each of a
//            shortcut's, 4 kh kw in dgrad of repeated pixels, whose y has two rows and columns at least; kh w c,
//            kh kw c_in c_out < 2^31, with the c and w of the image that is gathered from; behind the ring: 4 BM +
//            4 BN + SOURCES bytes of shared memory and TAP for each tap of the plan (fwd, dgrad), or ORIGINS (wgrad). A
//            shortcut's input has the pixels of x, which are those of y: a stride of 1, no repeated pixels, top < kh,
//            left < kw. Gradients that wait: if dx is one tensor, and its segments have no blocks of their own
#pragma once
#include "geometry.cuh"
#include "tile_mma.cuh"

namespace mma {

// Sets of taps: bit u for tap row u, bit 16 + v for tap column v.
using Taps = unsigned;

__device__ __forceinline__ Taps tap_row(unsigned u) { return 1u << u; }
__device__ __forceinline__ Taps tap_col(unsigned v) { return 1u << (16 + v); }

// A mask of k bits: bit t is set if 0 <= from + t < len.
__device__ __forceinline__ unsigned inside(int from, unsigned k, unsigned len) {
    const int first = max(-from, 0), end = min((int)k, (int)len - from);
    return first < end ? (1u << end) - (1u << first) : 0;
}

// Those of the taps of `axis` at `from` that are inside an image of `len` rows, each repeated if axis.up: a mask of
// axis.taps bits.
__device__ __forceinline__ unsigned inside(const Axis& axis, int from, unsigned len) {
    const unsigned once = inside(from, axis.turn, len << axis.up);
    return axis.taps == axis.turn ? once : once | inside(from + 1, axis.turn, len) << axis.turn;
}

// One of the image batches whose channels are summed over, one after the other, with its weights.
struct Source {
    const bf16 *from, *weight;  // pixel 0; the weight's first row and tap
    unsigned first, taps;  // where its taps begin in Plan::taps, in bytes, and how many it has
    int channels;
    int b_pitch, a_pitch;  // bytes from one row of the weight to the next, and from one pixel
    unsigned unused;
};

// Where one of its taps is: elements from the first tap's pixel on in the image, and from the beginning of the weight's
// row on. One access of 16 bytes reads it.
struct alignas(16) Tap {
    int a, b;
    Taps want;
    unsigned next;  // where the tap that follows begins, in bytes from the first; behind a source's last, its first
};

// Host twin: bytes of the sources in a plan.
constexpr int SOURCES = 160;

// Host twin: bytes of each tap in a plan.
constexpr int TAP = 16;

// What a block of fwd or dgrad sums over, in shared memory behind the ring, written before the first slab.
template <class TILE>
struct Plan {
    int patch[TILE::BM];  // of each row of the tile: the index of its first tap's pixel
    int row[TILE::BN];    // of each column: the row of the weight (fwd)
    // volatile, so that each word is read alone: nvcc would read several at once, and mark those that nobody needs with
    // a pragma of PTX 8.3, which drivers of CUDA 12.0 do not load.
    volatile Source sources[SOURCES / sizeof(Source)];
    Tap taps[1];  // as many as there are

    // By bytes, since an index would take an instruction more in each slab.
    __device__ __forceinline__ const Tap& tap(unsigned before) const {
        return *reinterpret_cast<const Tap*>(reinterpret_cast<const char*>(taps) + before);
    }

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
    unsigned first, taps;  // of the source
    int channels;          // that are left in the source, with those of this block
    int a, b, b_step;      // offsets of the block in both operands, in elements; in b from block to block
    Tap tap;

    // From slab `slab` on.
    __device__ Walk(const Plan<TILE>& plan_, unsigned sources_, unsigned slab)
        : plan(plan_), source(0), sources(sources_) {
        open();
        for (unsigned all; slab >= (all = (channels + BK - 1) / BK * taps) && source + 1 < sources;) {
            slab -= all;
            ++source;
            open();
        }
        const unsigned some = max(taps, 1);  // a class without taps has no slabs
        const int block = (int)(slab / some);
        channels -= block * BK;
        a = block * BK;
        b = block * b_step;
        tap = plan.tap(first + slab % some * TAP);
    }

    __device__ __forceinline__ void open() {
        const volatile Source& of = plan.sources[source];
        channels = of.channels;
        first = of.first;
        taps = of.taps;
        a = b = 0;
        b_step = B_ALONG_K ? BK : BK * (of.b_pitch / (int)sizeof(bf16));
    }

    // Calls other() if what follows is of another source. (A result that says so, which the caller tests, took two
    // instructions more a slab.)
    template <class OTHER>
    __device__ __forceinline__ void advance(OTHER other) {
        unsigned next = tap.next;
        if (next == first) {
            channels -= BK;
            a += BK;
            b += b_step;
            if (channels <= 0 && source + 1 < sources) {
                ++source;
                open();
                next = first;
                other();
            }
        }
        tap = plan.tap(next);
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
    __device__ __forceinline__ void open(const Plan<TILE>& plan, const volatile Source& source) {
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
    __device__ __forceinline__ void open(const Plan<TILE>& plan, const volatile Source& source) {
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
        const volatile Source& source = walk.plan.sources[walk.source];
        a.open(walk.plan, source);
        b.open(walk.plan, source);
    }

    __device__ __forceinline__ void bring(uint32_t slot) {
        a.bring(slot, walk.a + walk.tap.a, walk.tap.want, walk.channels);
        b.bring(slot, walk.b + walk.tap.b, walk.channels);
        walk.advance([&] { open(); });
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
        walk.advance([] {});
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

// What wgrad gathers from: x and, if it has one in the same pass, a shortcut's input, each one tensor or two.
struct Inputs {
    const bf16 *x, *x_second, *s, *s_second;
};

// The columns of a tile of dw: (u, v, channel) of the first tensor of x or of the second, or of the shortcut's tensors,
// which have one tap each, the pixel of y alone. Each tensor has tiles of its own, in this order.
struct Columns {
    const bf16* x;
    unsigned channels, kw, taps;  // of this tensor
    unsigned top, left;           // the first tap
    unsigned first;               // of the tile
    unsigned before, all;         // channels before those of this tensor, and of both
    bool of_shortcut;

    __device__ Columns(unsigned tile, unsigned bn, const Inputs& from, const Geometry& g)
        : x(from.x),
          channels(g.c_first),
          kw(g.kw),
          taps(g.kh * g.kw),
          top(0),
          left(0),
          before(0),
          all(g.c_in),
          of_shortcut(false) {
        unsigned tiles = Columns::tiles(channels * taps, bn);
        if (tile >= tiles) {
            tile -= tiles;
            x = from.x_second;
            before = g.c_first;
            channels = g.c_in - g.c_first;
            tiles = Columns::tiles(channels * taps, bn);
        }
        if (from.s && (of_shortcut = tile >= tiles)) {
            tile -= tiles;
            x = from.s;
            kw = taps = 1;
            top = g.top, left = g.left;
            before = 0, all = g.s_in;
            channels = g.s_first;
            tiles = Columns::tiles(channels, bn);
            if (tile >= tiles) {
                tile -= tiles;
                x = from.s_second;
                before = g.s_first;
                channels = g.s_in - g.s_first;
            }
        }
        first = tile * bn;
    }

    __device__ static unsigned tiles(unsigned width, unsigned bn) { return (width + bn - 1) / bn; }

    // Of all tensors.
    __device__ static unsigned tiles(unsigned bn, const Geometry& g) {
        const unsigned taps = g.kh * g.kw;
        return tiles(taps * g.c_first, bn) + tiles(taps * (g.c_in - g.c_first), bn) + tiles(g.s_first, bn) +
               tiles(g.s_in - g.s_first, bn);
    }

    __device__ __forceinline__ unsigned width() const { return taps * channels; }

    // Elements of a row of the weight, and before its first, of those of all weights.
    __device__ __forceinline__ unsigned pitch() const { return taps * all; }
    __device__ __forceinline__ size_t part(const Geometry& g) const {
        return of_shortcut ? (size_t)g.c_out * g.kh * g.kw * g.c_in : 0;
    }

    // Where column `col` is in a row of the weight, (kh, kw, c_in) or (s_in).
    __device__ __forceinline__ unsigned place(unsigned col) const {
        return channels == all ? col : col / channels * all + before + col % channels;
    }
};

// a = dy, b = patches of x with the tile's columns; k = pixels of y. Columns beyond the last are always tested: BLOCK
// is as CHUNK but for the turns written out.
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
        const unsigned c = columns.channels, tap = (columns.first + col) / c;
        const unsigned u = columns.top + tap / columns.kw, v = columns.left + tap % columns.kw;
        offset = (int)(((u >> g.up) * g.w + (v >> g.up)) * c + (columns.first + col) % c);
        want = tap < columns.taps ? tap_row(u) | tap_col(v) : ~0u;
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

// a = dy, b = one tap of x for pixels of y, as in WgradOperands, where both move on by one step from slab to slab: if
// an image has pixels that divide 32 slabs, and its rows pixels that divide one. Then each pixel of a thread stays in
// its column, and is in its row again after at most 32 slabs: whether the tap is inside is a mask that turns by a bit
// each slab.
template <class TILE>
struct SteadyWgradOperands {
    static constexpr bool A_ALONG_K = false, B_ALONG_K = false, WRITTEN_OUT = true;
    using P = Panel<TILE::THREADS, BK, TILE::BN>;
    AcrossK<TILE::THREADS, TILE::BM, Unit::BLOCK, true> a;
    unsigned a_step;  // elements of dy from slab to slab
    int b_step;       // bytes of x
    Places<P, TILE::BN> places;
    const bf16* row[P::PASSES];
    unsigned inside[P::PASSES];  // bit 4 for the next slab, 5 for the one behind it: as a number of bytes to copy, 16

    // Whether the columns and the pixels begin .. end are such.
    __device__ static bool suits(const Columns& columns, const Geometry& g, unsigned begin, unsigned end) {
        return columns.channels % TILE::BN == 0 && (end - begin) % BK == 0 && BK % g.ow == 0 &&
               32 * BK % (g.oh * g.ow) == 0 && g.oh * g.stride == g.h << g.up && BK / g.ow * g.stride % (1 + g.up) == 0;
    }

    __device__ SteadyWgradOperands(const bf16* dy, const Columns& columns, const Geometry& g, unsigned first_row,
                                   unsigned begin)
        : a(0, dy + (size_t)begin * g.c_out, first_row, g.c_out, g.c_out),
          a_step(BK * g.c_out),
          places(TILE::A_BYTES) {
        const unsigned rows = BK / g.ow, tap = columns.first / columns.channels;
        const int pitch = (int)(columns.channels * sizeof(bf16));
        const int u = (int)(columns.top + tap / columns.kw) - (int)g.top;
        const int v = (int)(columns.left + tap % columns.kw) - (int)g.left;
        b_step = (int)kept((rows * g.stride >> g.up) * g.w * pitch);
#pragma unroll
        for (int i = 0; i < P::PASSES; ++i) {
            Place place(begin + P::row() + i * P::STEP, g);
            const int x_col = (int)(place.col * g.stride) + v, x_row = (int)(place.row * g.stride) + u;
            const int pixel = ((int)(place.image * g.h) + (x_row >> g.up)) * (int)g.w + (x_col >> g.up);
            row[i] = kept(further(columns.x + columns.first % columns.channels + 8 * P::chunk(), pixel, pitch));
            unsigned period = 0;
            inside[i] = 0;
            do {
                const bool here = (unsigned)((int)(place.row * g.stride) + u) < g.h << g.up;
                inside[i] |= here << period++;
                place.row = (place.row + rows) % g.oh;
            } while (period * rows % g.oh != 0);
            for (; period < 32; period *= 2) inside[i] |= inside[i] << period;
            inside[i] = (unsigned)x_col < g.w << g.up ? __funnelshift_l(inside[i], inside[i], 4) : 0;
        }
    }

    __device__ __forceinline__ void bring(uint32_t slot) {
        a.bring(slot, 0, BK);
        a.advance(a_step);
#pragma unroll
        for (int i = 0; i < P::PASSES; ++i) {
#pragma unroll
            for (int j = 0; j < P::PIECES; ++j) {
                copy_async(slot + places.at(i, j), row[i] + 32 * j, inside[i] & 16);
            }
            row[i] = further(row[i], b_step, 1);
            inside[i] = __funnelshift_r(inside[i], inside[i], 1);
        }
    }
};

// The block's part of a sum over `slabs` slabs: number `index` of `count` segments, or all if no other block has the
// tile.
struct Part {
    unsigned first, slabs;

    __device__ Part(unsigned slabs_, unsigned segment, unsigned index, unsigned count)
        : first(index * segment), slabs(count > 1 ? min(segment, slabs_ - first) : slabs_) {}
};

// sum += the block's part of the product. If SEGMENTED, each segment is summed from zero; a segment of 0 slabs has all.
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
    static_assert(TILE::THREADS >= TILE::BM, "each pixel is found by a thread");
    static_assert(4 * TILE::BM * TILE::BN + sizeof(Pixel) * TILE::BM <= TILE::RING, "beside the results");
    static_assert(sizeof(Pixel) * TILE::BM <= TILE::SLOT, "within the last slot");
    return reinterpret_cast<Pixel*>(ring + TILE::RING) - TILE::BM;
}

// True for the threads that find a pixel.
template <class TILE>
__device__ __forceinline__ bool has_pixel() {
    return TILE::THREADS == TILE::BM || threadIdx.x < TILE::BM;
}

// Stores the tile whose first row is pixel `first` of `count`: f(sums, four, pixel) of each four neighbours; or, if the
// block has one of several segments, its sums to that segment's rows of `parts` (results, cols), otherwise null.
template <class TILE, class F>
__device__ __forceinline__ void store_pixels(const Results<bf16>& to, float* parts, unsigned char* ring,
                                             const Pixel* pixels, unsigned first, unsigned count, unsigned first_col,
                                             const Accumulators<TILE>& acc, F f) {
    each_four(reinterpret_cast<float*>(ring), acc, [&](int row, int col, float4 v) {
        const Four four(first_col + col, to.cols);
        if (four.count == 0 || first + row >= count) return;
        const Pixel& pixel = pixels[row];
        if (parts) {
            four.write(parts + (size_t)pixel.result * to.cols + four.col, v);
        } else {
            to.write(pixel.result, four, f(v, four, pixel));
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
                                   (rows.tap(t) * (int)g.kw + cols.tap(v)) * (int)g.c_in, tap_row(t) | tap_col(v),
                                   (taps + (e + 1 < count ? e + 1 : 0)) * TAP};
        }
        if (count == 0 && threadIdx.x == 0) plan.taps[taps] = {};  // read, but not used
        write(from, channels, weight, g.kh * g.kw * g.c_in, count);
    }

    // The pixel of y alone, which is tap (top, left).
    __device__ __forceinline__ void add_pixel(const bf16* from, unsigned channels, const bf16* weight,
                                              const Geometry& g) {
        if (channels == 0) return;
        if (threadIdx.x == 0) {
            plan.taps[taps] = {(int)((g.top * g.w + g.left) * channels), 0, tap_row(g.top) | tap_col(g.left),
                               taps * TAP};
        }
        write(from, channels, weight, g.s_in, 1);
    }

    __device__ __forceinline__ void write(const bf16* from, unsigned channels, const bf16* weight, unsigned pitch,
                                          unsigned count) {
        if (threadIdx.x == 0) {
            volatile Source& source = plan.sources[sources];
            source.from = from;
            source.weight = weight;
            source.channels = (int)channels;
            source.a_pitch = (int)(channels * sizeof(bf16));
            source.b_pitch = (int)(pitch * sizeof(bf16));
            source.first = taps * TAP;
            source.taps = count;
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
    if (has_pixel<TILE>()) plan.patch[threadIdx.x] = pixel.patch(h, w, up);
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
    if (has_pixel<TILE>()) pixels[threadIdx.x] = own;
    write_rows(plan, own, g.h, g.w, g.up, first_col, g.c_out);
    const unsigned others = g.c_in - g.c_first, s_others = g.s_in - g.s_first;
    Writer<TILE> writer(plan);
    writer.add(x, g.c_first, g.w, weight, g, rows, cols);
    writer.add(x_second, others, g.w, weight + g.c_first, g, rows, cols);
    writer.add_pixel(shortcut.s, g.s_first, shortcut.weight, g);
    writer.add_pixel(shortcut.s_second, s_others, shortcut.weight + g.s_first, g);
    __syncthreads();  // the plan and the pixels written above are read by the operands

    const Part part(writer.slabs, segment, blockIdx.z, gridDim.z);
    ForwardOperands<TILE, UNIT> operands(plan, writer.sources, pixels, g, rows, cols, part.first);
    Accumulators<TILE> sum;
    const int steps = steps_of<UNIT>(max(max(g.c_first, others), max(g.s_first, s_others)));
    multiply_part<TILE, SEGMENTED>(shared_address(ring), operands, part, segment, steps, sum);
    const Pixel again = of.pixel(first + threadIdx.x, rows, cols);
    if (has_pixel<TILE>()) pixels[threadIdx.x] = again;  // read behind a barrier of each_four
    if (gridDim.z > 1) parts += (size_t)blockIdx.z * g.n * g.oh * g.ow * g.c_out;
    store_pixels({y, nullptr, g.c_out, g.c_out}, gridDim.z > 1 ? parts : nullptr, ring, pixels, first, of.count,
                 first_col, sum, [&](float4 v, const Four& four, const Pixel& pixel) {
                     return plus.to(v, four, pixel.image, pixel.result, g.c_out);
                 });
}

// A shortcut as a convolution of its own: of pixels where they are.
__device__ __forceinline__ Geometry as_convolution(const Geometry& g) {
    return {g.n, g.h, g.w, g.s_in, g.oh, g.ow, g.c_out, 1, 1, 1, 0, 0, g.s_first, 0, 0, 0};
}

// A block's part of dgrad: a tile of one class of the pixels of dx, and of k one segment of `segments`, if these have
// blocks of their own; or a tile of the shortcut's.
struct DxBlock {
    unsigned tile, of_class, segment, segments;
    bool of_shortcut;
};

// Gradients of one image batch, in one tensor or two, and the weight of the product. A single tensor's may come on top
// of up to two others, `waiting` to be added: in f32, before the sum is rounded.
struct Dx {
    bf16 *first, *second;
    const bf16 *weight, *waiting, *waiting_second;

    __device__ __forceinline__ Dx or_other(bool other, const Dx& of) const {
        return {other ? of.first : first, other ? of.second : second, other ? of.weight : weight,
                other ? of.waiting : waiting, other ? of.waiting_second : waiting_second};
    }
};

// find() says what the block has. It is asked before the main loop and behind it, so that the loop keeps nothing of it
// in registers.
template <class TILE, Unit UNIT, bool SEGMENTED, class FIND>
__device__ __forceinline__ void dgrad(const Dx& of_x, const Dx& of_s, float* parts, const bf16* dy, const Geometry& all,
                                      unsigned segment, FIND find) {
    extern __shared__ __align__(1024) unsigned char ring[];
    Pixel* pixels = pixels_in<TILE>(ring);
    Accumulators<TILE> sum;
    {
        Plan<TILE>& plan = Plan<TILE>::behind(ring);
        const DxBlock block = find();
        const Geometry g = block.of_shortcut ? as_convolution(all) : all;
        const bf16* weight = of_x.or_other(block.of_shortcut, of_s).weight;
        const Class of(block.of_class, g.stride, g.n, g.h, g.w);
        const unsigned across = (g.c_in + TILE::BN - 1) / TILE::BN;
        const unsigned first = block.tile / across * TILE::BM, first_col = block.tile % across * TILE::BN;
        if (first >= of.count) return;
        const Axis rows = Axis::backward(of.above, g.kh, g.stride, g.top, g.up);
        const Axis cols = Axis::backward(of.before, g.kw, g.stride, g.left, g.up);
        const Pixel own = of.pixel(first + threadIdx.x, rows, cols);
        if (has_pixel<TILE>()) pixels[threadIdx.x] = own;
        write_rows(plan, own, g.oh, g.ow, 0, 0, 1);
        Writer<TILE> writer(plan);
        writer.add(dy, g.c_out, g.ow, weight, g, rows, cols);
        __syncthreads();  // the plan and the pixels written above are read by the operands

        const Part part(writer.slabs, segment, block.segment, block.segments);
        DgradOperands<TILE, UNIT> operands(plan, pixels, weight, first_col, g, rows, cols, part.first);
        multiply_part<TILE, SEGMENTED>(shared_address(ring), operands, part, block.of_shortcut ? 0 : segment,
                                       steps_of<UNIT>(g.c_out), sum);
    }
    const DxBlock block = find();
    const Geometry g = block.of_shortcut ? as_convolution(all) : all;
    const Dx dx = of_x.or_other(block.of_shortcut, of_s);
    const Class of(block.of_class, g.stride, g.n, g.h, g.w);
    const unsigned across = (g.c_in + TILE::BN - 1) / TILE::BN;
    const unsigned first = block.tile / across * TILE::BM, first_col = block.tile % across * TILE::BN;
    // Of a pixel of dx only the place of its result is read from here on.
    const Axis any = Axis::forward(1, 1, 0, 0, 0);
    const Pixel own = of.pixel(first + threadIdx.x, any, any);
    if (has_pixel<TILE>()) pixels[threadIdx.x] = own;  // read behind a barrier of each_four
    const size_t results = (size_t)g.n * g.h * g.w;
    store_pixels({dx.first, dx.second, g.c_first, g.c_in},
                 block.segments > 1 ? parts + block.segment * results * g.c_in : nullptr, ring, pixels, first, of.count,
                 first_col, sum, [&](float4 v, const Four& four, const Pixel& pixel) {
                     const size_t at = (size_t)pixel.result * g.c_in + four.col;
                     if (!dx.waiting) return v;
                     float4 before = four.read(dx.waiting + at);
                     if (dx.waiting_second) before = before + four.read(dx.waiting_second + at);
                     return before + v;
                 });
}

// A block's part of wgrad: a tile, and one segment of the pixels.
struct DwBlock {
    unsigned tile, segment;
};

// Writes the tile to dw if one segment has all pixels, or adds it, otherwise each segment's partial sums to (segments,
// parts of all weights), where a part is that of (c_out, kh, kw, c_in) and behind it that of the shortcut's (c_out,
// s_in). Unless `sums` is null, (segments, c_out) of it receives the sums of dy over the pixels of a segment. find() as
// in dgrad; a segment has `pixels` pixels.
template <class TILE, Unit UNIT_X, Unit UNIT_DY, class FIND>
__device__ __forceinline__ void wgrad(float* dw, double* sums, const Inputs& from, const bf16* dy, const Geometry& g,
                                      unsigned pixels, bool add, FIND find) {
    extern __shared__ __align__(1024) unsigned char ring[];
    OriginTable& origins = *reinterpret_cast<OriginTable*>(ring + TILE::RING);
    Accumulators<TILE> acc;
    ColumnSum<TILE> of_dy;
    {
        const DwBlock block = find();
        const unsigned across = Columns::tiles(TILE::BN, g), tile = block.tile % across;
        const Columns columns(tile, TILE::BN, from, g);
        const unsigned begin = block.segment * pixels, end = min(begin + pixels, g.n * g.oh * g.ow);

        const unsigned slabs = (end - begin + BK - 1) / BK, first_row = block.tile / across * TILE::BM;
        const bool summing = sums && tile == 0;
        auto look = [&](uint32_t slot) {
            if (summing) of_dy.add(slot);
        };
        bool steady = false;
        if constexpr (UNIT_X == Unit::BLOCK) {
            steady = SteadyWgradOperands<TILE>::suits(columns, g, begin, end);
            if (steady) {
                SteadyWgradOperands<TILE> operands(dy, columns, g, first_row, begin);
                multiply(shared_address(ring), operands, slabs, BK / 16, acc, 0, [] {}, look);
            }
        }
        if (!steady) {
            WgradOperands<TILE, UNIT_X, UNIT_DY> operands(dy, columns, origins, g, first_row, begin, end);
            __syncthreads();  // the first slabs' origins written above are read; the core's barriers order the others
            multiply(shared_address(ring), operands, slabs, BK / 16, acc, 0, [] {}, look);
        }
    }
    const DwBlock block = find();
    const unsigned across = Columns::tiles(TILE::BN, g), tile = block.tile % across;
    const unsigned first = block.tile / across * TILE::BM;
    const Columns columns(tile, TILE::BN, from, g);
    if (sums && tile == 0) of_dy.store(sums + (size_t)block.segment * g.c_out, first, g.c_out);
    dw += (size_t)block.segment * g.c_out * (g.kh * g.kw * g.c_in + g.s_in) + columns.part(g);
    each_four(reinterpret_cast<float*>(ring), acc, [&](int row, int col, float4 v) {
        // Four neighbours stay together unless the channels do not divide by four.
        Four four(columns.first + col, columns.width());
        if (four.count == 0 || first + row >= g.c_out) return;
        float* to = dw + (size_t)(first + row) * columns.pitch();
        if (columns.channels == columns.all || (columns.channels % 4 == 0 && columns.all % 4 == 0)) {
            to += columns.place(four.col);
            four.write(to, add ? four.read(to) + v : v);
        } else {
            const float e[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                if (i >= four.count) break;
                float* at = to + columns.place(four.col + i);
                *at = add ? *at + e[i] : e[i];
            }
        }
    });
}

// A launch of its own for dw or for dx.
struct DwAlone {
    __device__ __forceinline__ DwBlock operator()() const { return {blockIdx.x, blockIdx.y}; }
};
struct DxAlone {
    __device__ __forceinline__ DxBlock operator()() const { return {blockIdx.x, blockIdx.y, 0, 1, false}; }
};

// One launch for all gradients that there are. The tiles of dw are those of both weights, its segments of pixels; those
// of dx are each class's, its segments of slabs. Then come the tiles of the shortcut's dx.
template <class DX, Unit UNIT_DX, bool SEGMENTED, class DW, Unit UNIT_DW>
__device__ __forceinline__ void backward(float* dw, double* sums, const Dx& dx, const Dx& ds, float* parts,
                                         const Inputs& from, const bf16* dy, const Geometry& g,
                                         const BackwardBlocks& blocks) {
    static_assert(DX::THREADS == DW::THREADS, "blocks of one launch");
    if (blockIdx.x < blocks.dw_tiles * blocks.dw_segments) {
        wgrad<DW, UNIT_DW, UNIT_DW>(dw, sums, from, dy, g, blocks.dw_depth, false, [&]() -> DwBlock {
            const unsigned block = block_again();
            return {block % blocks.dw_tiles, block / blocks.dw_tiles};
        });
    } else {
        dgrad<DX, UNIT_DX, SEGMENTED>(dx, ds, parts, dy, g, blocks.dx_depth, [&]() -> DxBlock {
            const unsigned block = block_again() - blocks.dw_tiles * blocks.dw_segments;
            const unsigned classes = g.stride * g.stride, tile = block % blocks.dx_tiles;
            const unsigned group = block / blocks.dx_tiles;
            if (group >= classes * blocks.dx_segments) {
                return {block - blocks.dx_tiles * classes * blocks.dx_segments, 0, 0, 1, true};
            }
            return {tile, group % classes, group / classes, blocks.dx_segments, false};
        });
    }
}

}  // namespace mma
