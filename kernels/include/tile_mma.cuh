// Tiled matrix products on tensor cores: the core shared by the convolutions and the linear layer in bf16, with f32
// accumulators. (f32 tensors have tile_gemm.cuh, on FMAs or in tf32.)
//
// computes   acc = sum over k of a[row, k] b[k, col], one tile of BM x BN results per block. The operands bring one
//            slab, BK steps of k, at a time into a slot of a ring in shared memory: `bring` is the only place that
//            knows where a and b come from. On the way a block may sum a over k, column by column (ColumnSum)
// mapping    warp = WM x WN results in fragments of mma.m16n8k16. With 64x64 a warp loads 32 fragments of 16x16 for 128
//            mma, so that on an A100 shared memory is read half the time; smaller tiles are for smaller layers
// shared     ring of STAGES slots; slot = a panel of a, then one of b. A panel lies as its operand lies in global
//            memory, so none is ever transposed: rows of BK elements, or BK rows of BM (or BN) elements, which
//            ldmatrix.trans reads. Chunk c (8 elements, 16 bytes) of row r is at place c ^ r % 8 of its group of eight,
//            so that the eight rows of a matrix of ldmatrix, and the eight chunks that a quarter warp copies, are in
//            all 32 banks. r.c = chunk c of row r, [ ] = a matrix:
//
//                place       0     1     2     3     4     5     6     7      banks 4 place to 4 place + 3
//                row 0     [0.0]  0.1   0.2   0.3   0.4   0.5   0.6   0.7
//                row 1      1.1  [1.0]  1.3   1.2   1.5   1.4   1.7   1.6
//                row 2      2.2   2.3  [2.0]  2.1   2.6   2.7   2.4   2.5
//                row 3      3.3   3.2   3.1  [3.0]  3.7   3.6   3.5   3.4
//                row 4      4.4   4.5   4.6   4.7  [4.0]  4.1   4.2   4.3     ... and so on
//
//            Slab k is in slot k % STAGES:
//
//                k            prologue         0         1         2         3
//                wait                        slab 0    slab 1    slab 2    slab 3    it has arrived, for this thread
//                barrier                       b0        b1        b2        b3      ... for all; and all have read
//                bring        0>s0, 1>s1     2>s2      3>s0      4>s1      5>s2      the slot that is written here
//                multiply                      s0        s1        s2        s0
//
// bound by   tensor cores, if the tile is full: 128 mma of a warp take 1,024 cycles of a scheduler's on an A100, its
//            loads of shared memory 128 of the 256 that four warps share
// host       shared memory as Tile::RING says; extents below 2^30
// numerics   each result is summed over k in the order of the slabs, within one 16 steps at a time, and within those as
//            the hardware does it. So neither tile shape nor neighbours change its bits. Sums of columns as
//            column_sums.cuh says
#pragma once
#include "column_sums.cuh"
#include "ptx.cuh"

namespace mma {

// Host twin: steps of k in a slab.
constexpr int BK = 64;

// Host twin: slots of the ring.
constexpr int STAGES = 3;

// Host twin: the blocks of a launch for the gradients of a weight and of its input, those of dw first, which have more
// steps of k. A gradient without tiles has no blocks.
struct BackwardBlocks {
    unsigned dw_tiles, dw_segments, dw_depth;  // segments of k, with blocks of their own; steps of k in each
    unsigned dx_tiles, dx_segments, dx_depth;  // segments, if they have blocks of their own; the length of each
};

// What the extent of an operand along memory is a multiple of, by the host's choice of the kernel: of all that a block
// takes at a time, so that nothing needs a test; of 8, so that chunks are copied whole; or of nothing. Elements then
// travel one by one through registers.
enum class Unit { BLOCK, CHUNK, ELEMENT };

template <int BM_, int BN_, int WM_, int WN_>
struct Tile {
    static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_;
    static constexpr int THREADS = (BM / WM) * (BN / WN) * 32;
    static constexpr int A_BYTES = BM * BK * sizeof(bf16), SLOT = A_BYTES + BN * BK * sizeof(bf16);
    static constexpr int RING = STAGES * SLOT;
    static_assert(4 * BM * BN <= RING, "the results pass through the ring");
    static_assert(WM % 16 == 0 && WN % 16 == 0, "whole fragments");
    __device__ static int warp_row() { return threadIdx.x / 32 / (BN / WN) * WM; }
    __device__ static int warp_col() { return threadIdx.x / 32 % (BN / WN) * WN; }
};

// Numbers and addresses that the compiler keeps in registers, instead of computing them again where they are used: in
// the main loop.
__device__ __forceinline__ uint32_t kept(uint32_t v) {
    asm volatile("" : "+r"(v));
    return v;
}
__device__ __forceinline__ const bf16* kept(const bf16* p) {
    asm volatile("" : "+l"(p));
    return p;
}

// threadIdx.x and blockIdx.x, read again where they are needed after the main loop, in which there are no registers for
// what depends on them.
__device__ __forceinline__ unsigned thread_again() {
    unsigned i;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
    return i;
}
__device__ __forceinline__ unsigned block_again() {
    unsigned i;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(i));
    return i;
}

// A panel of ROWS rows of WIDTH elements, and which of its chunks this thread brings: of rows row() + i THREADS / 4,
// for each i < PASSES, the chunks chunk() + 4 j, for each j < PIECES. So four lanes copy 64 bytes of a row, and a
// quarter warp takes two rows that differ by 4: their chunks are in different halves of the banks.
template <int THREADS, int ROWS, int WIDTH>
struct Panel {
    static constexpr int BYTES = ROWS * WIDTH * sizeof(bf16);
    static constexpr int STEP = THREADS / 4;
    static constexpr int PASSES = ROWS > STEP ? ROWS / STEP : 1;
    static constexpr int PIECES = WIDTH / 32;
    static_assert(WIDTH % 64 == 0 && ROWS % 8 == 0, "rows of whole groups of eight chunks");
    __device__ static int row() { return threadIdx.x / 32 * 8 + threadIdx.x / 4 % 2 * 4 + threadIdx.x / 8 % 4; }
    __device__ static int chunk() { return threadIdx.x % 4; }
    // False for threads that find no row left.
    __device__ static bool busy() { return STEP <= ROWS || row() < ROWS; }
};

// Where these chunks are in the slot, if the panel begins `before` bytes into it. STEP is a multiple of 8, so that
// row % 8 is the same in every pass.
template <class P, int WIDTH>
struct Places {
    uint32_t offset[2];  // of the first row's first two chunks; two chunks later is 128 bytes further

    __device__ explicit Places(int before) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int c = P::chunk() + 4 * j;
            offset[j] = kept(before + P::row() * WIDTH * sizeof(bf16) + (c ^ P::row() % 8) * 16);
        }
    }

    __device__ __forceinline__ uint32_t at(int pass, int piece) const {
        return offset[piece % 2] + piece / 2 * 128 + pass * P::STEP * WIDTH * sizeof(bf16);
    }
};

// Copies a chunk of eight elements, of which the first `count` (none if negative) exist if `inside`, and otherwise
// none; zeros take the place of the others.
template <Unit UNIT>
__device__ __forceinline__ void copy(uint32_t to, const bf16* from, bool inside, int count) {
    if (UNIT == Unit::BLOCK) {
        copy_async(to, from, inside);
    } else if (UNIT == Unit::CHUNK) {
        copy_async(to, from, inside && count > 0);
    } else {
        unsigned e[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            e[i] = inside && i < count ? *reinterpret_cast<const unsigned short*>(from + i) : 0;
        }
        store_shared(to, make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16, e[6] | e[7] << 16));
    }
}

// Rows of a matrix, contiguous along k, as a panel of ROWS rows of BK elements. Rows beyond the last repeat it: they
// are multiplied but not stored, which costs no test.
template <int THREADS, int ROWS, Unit UNIT>
struct AlongK {
    using P = Panel<THREADS, ROWS, BK>;
    const bf16* row[P::PASSES];
    Places<P, BK> places;

    // From row `first` of `rows`, which are `pitch` elements apart; to a panel `before` bytes into the slot.
    __device__ AlongK(int before, const bf16* from, unsigned first, unsigned rows, size_t pitch) : places(before) {
#pragma unroll
        for (int i = 0; i < P::PASSES; ++i) {
            row[i] = kept(from + min(first + P::row() + i * P::STEP, rows - 1) * pitch + 8 * P::chunk());
        }
    }

    // The elements from `at` of each row on, of which `count` exist.
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

// Columns of a matrix with a row for each k, as a panel of BK rows of COLS elements. What is beyond the last k, and
// columns beyond the last, are zero. FULL: every slab has all its rows.
template <int THREADS, int COLS, Unit UNIT, bool FULL>
struct AcrossK {
    using P = Panel<THREADS, BK, COLS>;
    const bf16* row[P::PASSES];
    Places<P, COLS> places;
    int count;  // columns from the thread's first on

    // From column `first` of `cols`; row 0 is at `from`, and rows are `pitch` elements apart. To a panel `before` bytes
    // into the slot.
    __device__ AcrossK(int before, const bf16* from, unsigned first, unsigned cols, size_t pitch)
        : places(before), count((int)(cols - first) - 8 * P::chunk()) {
#pragma unroll
        for (int i = 0; i < P::PASSES; ++i) {
            row[i] = kept(from + (P::row() + i * P::STEP) * pitch + first + 8 * P::chunk());
        }
    }

    // Row 0 moves on.
    __device__ __forceinline__ void advance(size_t by) {
#pragma unroll
        for (int i = 0; i < P::PASSES; ++i) row[i] += by;
    }

    // The rows from offset `at` on, of which `rows` exist.
    __device__ __forceinline__ void bring(uint32_t slot, int at, int rows) const {
#pragma unroll
        for (int i = 0; i < P::PASSES; ++i) {
            const bf16* from = row[i] + at;
            const bool inside = FULL || P::row() + i * P::STEP < rows;
#pragma unroll
            for (int j = 0; j < P::PIECES; ++j) {
                copy<UNIT>(slot + places.at(i, j), from + 32 * j, inside, count - 32 * j);
            }
        }
    }
};

// How a warp reads the fragments of an operand out of its panel: of a, or of b two neighbouring ones at a time, so that
// either is 16 x 16. EXTENT is BM or BN, COUNT the warp's fragments; ALONG: the panel has rows of BK elements.
template <int EXTENT, int COUNT, bool ALONG, bool OF_A>
struct Fragments {
    // Of the lane's chunk: for the first fragment and each 16 steps of k (ALONG), or the other way round. In the same
    // row chunks differ by an exclusive or.
    static constexpr int CHUNKS = ALONG ? BK / 16 : COUNT;
    uint32_t offset[CHUNKS];

    // Of a panel that begins `before` bytes into the slot; from row (of a) or column (of b) `first` on.
    __device__ Fragments(int before, int first) {
        const int lane = threadIdx.x % 32, low = lane % 8;
        const int by_two = low + lane / 8 % 2 * 8, by_four = low + lane / 16 * 8;
#pragma unroll
        for (int n = 0; n < CHUNKS; ++n) {
            if (ALONG) {
                const int row = first + (OF_A ? by_two : by_four), chunk = 2 * n + (OF_A ? lane / 16 : lane / 8 % 2);
                offset[n] = kept(before + row * BK * sizeof(bf16) + (chunk ^ low) * 16);
            } else {
                const int k = OF_A ? by_four : by_two, chunk = 2 * n + (OF_A ? lane / 8 % 2 : lane / 16);
                offset[n] = kept(before + k * EXTENT * sizeof(bf16) + (first / 8 + chunk ^ low) * 16);
            }
        }
    }

    // Fragment i for the 16 steps of k from 16 s on.
    __device__ __forceinline__ void load(uint32_t (&r)[4], uint32_t slot, int i, int s) const {
        if (ALONG) {
            load_matrices<false>(r, slot + offset[s] + i * 16 * BK * sizeof(bf16));
        } else {
            load_matrices<true>(r, slot + offset[i] + s * 16 * EXTENT * sizeof(bf16));
        }
    }
};

// A lane's results: for fragment (i, j) of its warp, acc[i][j], as multiply_add says.
template <class TILE>
struct Accumulators {
    static constexpr int I = TILE::WM / 16, J = TILE::WN / 8;
    float acc[I][J][4] = {};

    // Adds the product over the first 16 `steps` of k of a slot.
    template <class LEFT, class RIGHT>
    __device__ __forceinline__ void add_product(const LEFT& left, const RIGHT& right, uint32_t slot, int steps) {
#pragma unroll
        for (int s = 0; s < BK / 16; ++s) {
            if (s == steps) break;
            uint32_t a[I][4], b[J / 2][4];
#pragma unroll
            for (int i = 0; i < I; ++i) left.load(a[i], slot, i, s);
#pragma unroll
            for (int j = 0; j < J / 2; ++j) right.load(b[j], slot, j, s);
#pragma unroll
            for (int i = 0; i < I; ++i)
#pragma unroll
                for (int j = 0; j < J; ++j) multiply_add(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }

    // Adds the results of `other` and clears them.
    __device__ __forceinline__ void take(Accumulators& other) {
#pragma unroll
        for (int i = 0; i < I; ++i)
#pragma unroll
            for (int j = 0; j < J; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    acc[i][j][e] += other.acc[i][j][e];
                    other.acc[i][j][e] = 0.0f;
                }
    }
};

// The sums over k of the columns of a, which lies as BK rows of BM elements: what a bias takes of dy in the pass for
// the weight. Thread t has column t, the slab's BK terms as column_sums.cuh says.
template <class TILE>
struct ColumnSum {
    double sum = 0.0;

    // Adds those of a slot. What is beyond the last k is zero there.
    __device__ __forceinline__ void add(uint32_t slot) {
        if (threadIdx.x >= TILE::BM) return;
        const uint32_t column = slot + threadIdx.x / 8 * 16 + threadIdx.x % 8 * sizeof(bf16);
        float hi = 0.0f, lo = 0.0f;
#pragma unroll 8
        for (unsigned k = 0; k < BK; ++k) {
            add_term(hi, lo, load_shared_bf16((column ^ (k % 8 * 16)) + k * TILE::BM * sizeof(bf16)));
        }
        sum += double(hi) + double(lo);
    }

    // To element `first` and the next of `to`, which has `count`.
    __device__ __forceinline__ void store(double* to, unsigned first, unsigned count) const {
        const unsigned thread = thread_again();
        if (thread < TILE::BM && first + thread < count) to[first + thread] = sum;
    }
};
static_assert(BK <= SHORT, "a slab is a short sum");

struct Nothing {
    __device__ void operator()(uint32_t) const {}
};

// acc += the product over the next `slabs` slabs. Of the BK steps of k of each, 16 * steps are multiplied: fewer than
// all where the operands never have more. each() is called after every `segment` slabs, unless that is 0, and once more
// at the end, when it may have nothing to add; look(slot) for every slab while it is in its slot. Operands have
// bring(slot), called once for each slab, in order; A_ALONG_K and B_ALONG_K, whether the rows of a panel run along k;
// and WRITTEN_OUT, whether the turns are written out, which is faster and three times the code.
template <class TILE, class OPERANDS, class EACH, class LOOK = Nothing>
__device__ __forceinline__ void multiply(uint32_t ring, OPERANDS& operands, unsigned slabs, int steps,
                                         Accumulators<TILE>& acc, unsigned segment, EACH each, LOOK look = LOOK()) {
    static_assert(STAGES == 3, "as many turns are written out below");
    const Fragments<TILE::BM, TILE::WM / 16, OPERANDS::A_ALONG_K, true> left_operand(0, TILE::warp_row());
    const Fragments<TILE::BN, TILE::WN / 16, OPERANDS::B_ALONG_K, false> right_operand(TILE::A_BYTES,
                                                                                     TILE::warp_col());
#pragma unroll
    for (unsigned k = 0; k < STAGES - 1; ++k) {
        if (k < slabs) operands.bring(ring + k * TILE::SLOT);
        commit_group();  // even an empty one, so that the count of those that may be under way is right
    }
    unsigned rest = segment;
    auto product = [&](uint32_t slot) {
        acc.add_product(left_operand, right_operand, slot, steps);
        look(slot);
        if (--rest == 0) {
            each();
            rest = segment;
        }
    };
    // The turns in which a slab is brought. Written out, each has a constant slot and none asks whether there is a slab
    // to bring; one counter ends them.
    const unsigned last = OPERANDS::WRITTEN_OUT ? min(slabs, STAGES - 1) : slabs;
    unsigned turns = slabs - last;
    auto turn = [&](unsigned slot) {
        wait_group<STAGES - 2>();
        __syncthreads();  // slab k is there for all threads, and all have read slab k - 1, whose slot is written next
        operands.bring(ring + (slot + STAGES - 1) % STAGES * TILE::SLOT);
        commit_group();
        product(ring + slot * TILE::SLOT);
        return --turns != 0;
    };
    if (turns != 0) {
        while (turn(0) && turn(1) && turn(2)) {}
    }
    // The last STAGES - 1 turns, which bring nothing; or, unless written out, all.
#pragma unroll 1
    for (unsigned left = last, slot = (slabs - last) % STAGES; left > 0; slot = (slot + 1) % STAGES, --left) {
        wait_group<STAGES - 2>();
        __syncthreads();  // as above
        if (!OPERANDS::WRITTEN_OUT && left > STAGES - 1) {
            operands.bring(ring + (slot + STAGES - 1) % STAGES * TILE::SLOT);
        }
        commit_group();
        product(ring + slot * TILE::SLOT);
    }
    each();
    wait_group<0>();
    __syncthreads();  // all have read the last slab: the ring may be used for the results
}

// Of 16 steps of k, how many a slab has if each tap has `channels` channels.
template <Unit UNIT>
__device__ __forceinline__ int steps_of(unsigned channels) {
    return UNIT == Unit::BLOCK ? BK / 16 : (int)min((channels + 15) / 16, BK / 16u);
}

// Passes the results through the ring, as f32 (BM, BN), and calls f(row, col, four) for each four neighbours of a row.
// Unit u of a row (four columns) is at place u ^ 2 (row % 4), so that the four rows of a half warp's stores are in
// different banks. (Rows of 64 bytes: u ^ row & 2.) All threads call it.
template <class TILE, class F>
__device__ __forceinline__ void each_four(float* ring, const Accumulators<TILE>& acc, F f) {
    constexpr int ACROSS = TILE::BN / 4;
    auto place = [](int row, int unit) {
        const int swizzle = TILE::BN >= 32 ? row % 4 * 2 : row & 2;
        return row * TILE::BN + (unit ^ swizzle) * 4;
    };
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < TILE::WM / 16; ++i)
#pragma unroll
        for (int j = 0; j < TILE::WN / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = TILE::warp_row() + 16 * i + 8 * half + g, col = TILE::warp_col() + 8 * j + 2 * t;
                float* to = ring + place(row, col / 4) + col % 4;
                *reinterpret_cast<float2*>(to) = make_float2(acc.acc[i][j][2 * half], acc.acc[i][j][2 * half + 1]);
            }
    __syncthreads();  // the results written above are read below by other threads
    const int unit = threadIdx.x % ACROSS;
    for (int row = threadIdx.x / ACROSS; row < TILE::BM; row += TILE::THREADS / ACROSS) {
        f(row, 4 * unit, load4(ring + place(row, unit)));
    }
}

// Stores the tile that begins at (row, col) to `to` (rows, cols), or adds it if `add`.
template <class TILE>
__device__ __forceinline__ void store_tile(float* to, unsigned char* ring, unsigned row, unsigned rows, unsigned col,
                                           unsigned cols, bool add, const Accumulators<TILE>& acc) {
    each_four(reinterpret_cast<float*>(ring), acc, [&](int r, int c, float4 v) {
        const Four four(col + c, cols);
        if (four.count == 0 || row + r >= rows) return;
        float* p = to + (size_t)(row + r) * cols + four.col;
        if (add) v = four.read(p) + v;
        if (four.vector) return store_global(p, v);
        four.write(p, v);
    });
}

}  // namespace mma
