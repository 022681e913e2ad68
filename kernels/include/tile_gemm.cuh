// Tiled matrix products of f32 tensors: the core shared by the convolutions and the linear layer, on FMAs in f32 and on
// tensor cores in tf32.
//
// computes   acc = sum over k of a[row, k] b[k, col], one tile of BM x BN results per block. Two operands define where
//            a and b come from; each brings BK steps of k at a time into shared memory.
// mapping    block = 64 threads = one tile; thread = 8 x 8 results: rows r to r + 3 and the same half a tile below,
//            columns likewise, four 16-byte loads of shared memory for 64 FMAs per lane. Two warps, not eight: a small
//            tile wastes little of a small layer (7x7 pixels, 32 channels) and gives it enough blocks; and 8x8 per
//            thread reads half as much per FMA as 4x4.
//            Threads are paired: t and t ^ 1 have the same columns, t and t ^ 2 the same rows. A 16-byte load of a warp
//            takes four cycles of shared memory, one for each quarter warp, but two if all lanes share their addresses
//            with their neighbours, i ^ 1 or i ^ 2, and each half warp then meets no bank twice. So every load takes
//            two
//
//            threads of a warp, 64x64       columns 0..3    4..7    8..11   12..15  ..  28..31
//                             rows 0..3       t 0     t 2     t 4     t 6         t 14
//                             rows 4..7       t 1     t 3     t 5     t 7         t 15
//                             rows 8..11      t 16    t 18    t 20    t 22        t 30
//                             rows 12..15     t 17    t 19    t 21    t 23        t 31
//            In tf32 a warp has 64x32 results of the tile (32x64 of 32x128), in products of 16 x 8 results over eight
//            steps of k (multiply_add_tf32). Rows, columns and steps of such a product may be any, as long as all its
//            operands mean the same. They are taken so that what a lane needs of an operand lies side by side: with
//            g = lane / 4 and t = lane % 4, in each 32 rows and 32 columns
//
//                rows 4 g, 4 g + 1      rows g and g + 8 of the first product
//                rows 4 g + 2, 4 g + 3  those of the second
//                columns 4 g + j        column g of product j, of four
//                steps 2 t, 2 t + 1     steps t and t + 4
//
//            So a lane reads 16 bytes of shared memory for a step of 32 rows or columns, the eight lanes of a quarter
//            warp from all 32 banks, and has of the results rows 4 g to 4 g + 3, columns 8 t to 8 t + 7
// shared     two buffers of (BK x BM, BK x BN), k-major: 9 KB for 64x64, 11 KB for 128x32 and 32x128. While one is
//            multiplied, the next travels through registers into the other: one barrier every BK steps of k.
// bound by   with full tiles, what a scheduler issues: one instruction a cycle, of which 0.7 to 0.8 are FMAs. On an
//            A100 the FMAs themselves, which take two cycles there. Shared memory comes next: for eight steps of k a
//            warp reads for 8 x 4 x 2 = 64 cycles and writes both operands in 16 (64x64; 128x32: 20), four warps on
//            four schedulers for 320 in the 512 (A100: 1024) cycles of their FMAs. With the threads of a warp in rows
//            of eight, only the reads of a shared their addresses: 448. In tf32 the products of eight steps are 16
//            instructions of a warp instead of 512, and 128 cycles of an A100's tensor cores. It reads for 24 cycles
//            and writes for as long as in f32: shared memory is busy for 160 cycles of four warps (64x64). What finds,
//            moves and rounds the operands stays, and is what a scheduler issues
// host       extents below 2^30, so that an index a tile beyond the last stays below 2^32
// numerics   every result is summed over k in order, one FMA per step, so neither tile shape nor neighbours change its
//            bits. In tf32 each operand is rounded to 10 bits of fraction, to nearest, ties away from zero: 2^-11 of
//            it, at most, and NaN and infinity stay (a number within 2^-12 of the largest becomes infinite). A product
//            of two is exact in f32; eight steps of k are added to the sum by one instruction, in an order that is the
//            tensor core's but the same for every result, and may be cut where f32 would round.
//
// Operands have fetch() (the next BK steps of k, global memory to registers: quads) and put(tile) (registers to shared
// memory). Rows and columns beyond the matrix repeat its last one: they are read and multiplied but not stored, which
// costs no test. Beyond the end of k both operands are zero.
#pragma once
#include "dtype.cuh"
#include "ptx.cuh"

// Host twin: threads per block that computes a tile.
constexpr int THREADS = 64;

// Host twin: blocks of 64x64 that a multiprocessor holds at once, in a convolution's f32 fwd and dgrad: the compiler
// leaves each thread 128 registers, where it would take up to 153 (six blocks), at 5 more instructions beside 512 FMAs.
// The others take up to 167 and run six: the weight gradients would spill up to 100 bytes, the linear layer's f32
// kernels 24, those of a convolution in tf32 32, and for 128x32 an RTX 4090 has shared memory for six.
constexpr int RESIDENT = 8;

// Host twin: steps of k between two barriers. 16 are no faster in the emulator and take 30 more registers for data in
// flight.
constexpr int BK = 8;

// Rows of shared memory are padded by four: see AlongK.
template <int SIDE>
using Side = float[BK][SIDE + 4];

// Quads (four elements) of an operand that each thread fetches.
template <int SIDE>
constexpr int QUADS = SIDE * BK / 4 / THREADS;

template <int BM_, int BN_>
struct Tile {
    static constexpr int BM = BM_, BN = BN_;
    static_assert(BM * BN == THREADS * 64, "every thread has its 8x8");
    Side<BM> a[2];  // (2, BK, BM + 4)
    Side<BN> b[2];  // (2, BK, BN + 4)
};

// What multiplies: the lanes for f32, or the tensor cores, with operands rounded to tf32.
enum class Math { FMA, TF32 };

// Four neighbours in flight from global to shared memory.
struct Quad {
    float4 v;
    __device__ void clear() { v = make_float4(0.0f, 0.0f, 0.0f, 0.0f); }
    __device__ void load(const float* p) { v = load4(p); }
    // Element i alone, after clear(); i is a constant.
    __device__ void load(int i, const float* p) { (i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w) = *p; }
};

// A thread's accumulators. Its i-th row (of ROWS) is row(i) of the tile; its columns begin at col(q), of ACROSS, four
// each. Both grow with their numbers.
template <class TILE, Math MATH>
struct Accumulators;

template <class TILE>
struct Accumulators<TILE, Math::FMA> {
    static constexpr int ROWS = 8, ACROSS = 2;
    float acc[8][8] = {};
    static constexpr int THREADS_ACROSS = TILE::BN / 8;  // threads side by side along the columns
    __device__ static int row(int i) {
        return (threadIdx.x % 2 + threadIdx.x / (2 * THREADS_ACROSS) * 2) * 4 + i % 4 + i / 4 * (TILE::BM / 2);
    }
    __device__ static int col(int q) { return threadIdx.x / 2 % THREADS_ACROSS * 4 + q * (TILE::BN / 2); }
    __device__ float4 quad(int i, int q) const {
        const float* row = acc[i] + 4 * q;
        return make_float4(row[0], row[1], row[2], row[3]);
    }

    // What an operand brings, as it is multiplied.
    template <int N>
    __device__ __forceinline__ static void round(Quad (&)[N]) {}

    __device__ __forceinline__ void add_product(const Side<TILE::BM>& a, const Side<TILE::BN>& b) {
#pragma unroll
        for (int k = 0; k < BK; ++k) {
            const float4 u = load4(&a[k][row(0)]), v = load4(&a[k][row(4)]);
            const float4 w = load4(&b[k][col(0)]), z = load4(&b[k][col(1)]);
            const float left[8] = {u.x, u.y, u.z, u.w, v.x, v.y, v.z, v.w};
            const float right[8] = {w.x, w.y, w.z, w.w, z.x, z.y, z.z, z.w};
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) acc[i][j] = fmaf(left[i], right[j], acc[i][j]);
        }
    }
};

template <class TILE>
struct Accumulators<TILE, Math::TF32> {
    // Rows and columns of a warp.
    static constexpr int WM = TILE::BM < 64 ? TILE::BM : 64, WN = TILE::BM * TILE::BN / 2 / WM;
    static_assert(WM % 32 == 0 && WN % 32 == 0 && BK == 8, "32 rows or columns at a time, all steps of k");
    static constexpr int ROWS = WM / 8, ACROSS = WN / 16;
    float acc[WM / 16][WN / 8][4] = {};

    __device__ static int row(int i) {
        return threadIdx.x / 32 / (TILE::BN / WN) * WM + i / 4 * 32 + threadIdx.x % 32 / 4 * 4 + i % 4;
    }
    __device__ static int col(int q) {
        return threadIdx.x / 32 % (TILE::BN / WN) * WN + q / 2 * 32 + threadIdx.x % 4 * 8 + q % 2 * 4;
    }
    __device__ float4 quad(int i, int q) const {
        const float(*products)[4] = acc[i / 2] + q / 2 * 4;
        const int of = i % 2 * 2 + q % 2;
        return make_float4(products[0][of], products[1][of], products[2][of], products[3][of]);
    }

    // On the way to shared memory a thread rounds 16 or 20 numbers for eight steps of k; on the way out it would be 24.
    template <int N>
    __device__ __forceinline__ static void round(Quad (&quads)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            float4& v = quads[i].v;
            v = make_float4(to_tf32(v.x), to_tf32(v.y), to_tf32(v.z), to_tf32(v.w));
        }
    }

    // What the lane's 32 rows or columns from `from` on have for both of its steps of k.
    template <int SIDE>
    __device__ __forceinline__ static void fragments(uint32_t (&f)[2][4], const Side<SIDE>& side, int from) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            const float4 v = load4(&side[threadIdx.x % 4 * 2 + step][from + threadIdx.x % 32 / 4 * 4]);
            f[step][0] = __float_as_uint(v.x);
            f[step][1] = __float_as_uint(v.y);
            f[step][2] = __float_as_uint(v.z);
            f[step][3] = __float_as_uint(v.w);
        }
    }

    __device__ __forceinline__ void add_product(const Side<TILE::BM>& a, const Side<TILE::BN>& b) {
        const int warp = threadIdx.x / 32;
        uint32_t right[WN / 32][2][4];
#pragma unroll
        for (int c = 0; c < WN / 32; ++c) fragments<TILE::BN>(right[c], b, warp % (TILE::BN / WN) * WN + 32 * c);
#pragma unroll
        for (int r = 0; r < WM / 32; ++r) {
            uint32_t left[2][4];
            fragments<TILE::BM>(left, a, warp / (TILE::BN / WN) * WM + 32 * r);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t rows[4] = {left[0][2 * i], left[0][2 * i + 1], left[1][2 * i], left[1][2 * i + 1]};
#pragma unroll
                for (int j = 0; j < WN / 8; ++j) {
                    multiply_add_tf32(acc[2 * r + i][j], rows, right[j / 4][0][j % 4], right[j / 4][1][j % 4]);
                }
            }
        }
    }
};

// acc += the product over the next steps * BK of k.
template <class TILE, Math MATH, class A, class B>
__device__ __forceinline__ void multiply(TILE& tile, A& a, B& b, unsigned steps, Accumulators<TILE, MATH>& acc) {
    for (unsigned step = 0;; ++step) {
        if (step < steps) {
            a.fetch();
            b.fetch();
        }
        if (step > 0) acc.add_product(tile.a[(step - 1) % 2], tile.b[(step - 1) % 2]);
        if (step == steps) return;
        acc.round(a.quads);
        acc.round(b.quads);
        a.put(tile.a[step % 2]);
        b.put(tile.b[step % 2]);
        __syncthreads();  // the next round reads what was written above and overwrites what was read
    }
}

// How threads divide an operand that is contiguous along k: quads of four k, transposed when they are put. A warp takes
// 16 rows and two neighbouring quads: whole 32-byte sectors of global memory (f32). In shared memory rows of SIDE + 4
// put the second quad 16 banks away from the first, so each store of a warp hits 32 different banks.
struct AlongK {
    __device__ static int k() { return threadIdx.x % 2 * 4; }
    // The thread's i-th row of the tile.
    __device__ static int row(int i) { return threadIdx.x / 2 + i * (THREADS / 2); }

    template <int SIDE>
    __device__ __forceinline__ static void put(Side<SIDE>& tile, const Quad (&quads)[QUADS<SIDE>]) {
#pragma unroll
        for (int i = 0; i < QUADS<SIDE>; ++i) {
            const float4 v = quads[i].v;
            tile[k() + 0][row(i)] = v.x;
            tile[k() + 1][row(i)] = v.y;
            tile[k() + 2][row(i)] = v.z;
            tile[k() + 3][row(i)] = v.w;
        }
    }
};

// How threads divide an operand that is contiguous along the tile's side: quads of four columns, SIDE/4 neighbouring
// threads per step of k.
template <int SIDE>
struct AcrossK {
    __device__ static int col() { return threadIdx.x % (SIDE / 4) * 4; }
    // The thread's i-th k is k() + step(i).
    __device__ static int k() { return threadIdx.x / (SIDE / 4); }
    __device__ static constexpr int step(int i) { return i * (THREADS * 4 / SIDE); }

    __device__ __forceinline__ static void put(Side<SIDE>& tile, const Quad (&quads)[QUADS<SIDE>]) {
#pragma unroll
        for (int i = 0; i < QUADS<SIDE>; ++i) store4(&tile[k() + step(i)][col()], quads[i].v);
    }
};

// Columns col to col + 3 of a row of `cols`; beyond the end the last ones repeat.
__device__ __forceinline__ void load_columns(Quad& quad, const float* row, unsigned col, unsigned cols, bool vector) {
    if (vector) {
        quad.load(row + min(col, cols - 4));
    } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) quad.load(j, row + min(col + j, cols - 1));
    }
}

// An operand with rows of `depth` elements, contiguous along k.
template <int SIDE>
struct Rows {
    // Advance along k: with a base and an offset nvcc recomputes addresses in every step.
    const float* row[QUADS<SIDE>];
    unsigned k, depth;
    bool vector;  // depth divides by four
    Quad quads[QUADS<SIDE>];

    // From row `first` of `rows`.
    __device__ Rows(const float* from, unsigned first, unsigned rows, unsigned depth_)
        : k(AlongK::k()), depth(depth_), vector(depth_ % 4 == 0) {
#pragma unroll
        for (int i = 0; i < QUADS<SIDE>; ++i) {
            row[i] = from + (size_t)min(first + AlongK::row(i), rows - 1) * depth + k;
        }
    }

    __device__ __forceinline__ void fetch() {
#pragma unroll
        for (int i = 0; i < QUADS<SIDE>; ++i) quads[i].clear();
        if (vector) {
            if (k < depth) {
#pragma unroll
                for (int i = 0; i < QUADS<SIDE>; ++i) quads[i].load(row[i]);
            }
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (k + j < depth) {
#pragma unroll
                    for (int i = 0; i < QUADS<SIDE>; ++i) quads[i].load(j, row[i] + j);
                }
            }
        }
        k += BK;
#pragma unroll
        for (int i = 0; i < QUADS<SIDE>; ++i) row[i] += BK;
    }

    __device__ __forceinline__ void put(Side<SIDE>& tile) const { AlongK::put<SIDE>(tile, quads); }
};

// An operand with a row of `cols` elements for each k.
template <int SIDE>
struct Columns {
    const float* from;
    unsigned k, end, col, cols;
    bool vector;  // cols divides by four
    Quad quads[QUADS<SIDE>];

    // From column `first`, for k from `begin` to `end`.
    __device__ Columns(const float* from_, unsigned first, unsigned cols_, unsigned begin, unsigned end_)
        : from(from_),
          k(begin + AcrossK<SIDE>::k()),
          end(end_),
          col(first + AcrossK<SIDE>::col()),
          cols(cols_),
          vector(cols_ % 4 == 0) {}

    __device__ __forceinline__ void fetch() {
#pragma unroll
        for (int i = 0; i < QUADS<SIDE>; ++i) {
            quads[i].clear();
            const unsigned row = k + AcrossK<SIDE>::step(i);
            if (row < end) load_columns(quads[i], from + (size_t)row * cols, col, cols, vector);
        }
        k += BK;
    }

    __device__ __forceinline__ void put(Side<SIDE>& tile) const { AcrossK<SIDE>::put(tile, quads); }
};

// Stores the tile that begins at (row, col) to `to` (rows, cols), or adds it if `add`.
template <class TILE, Math MATH>
__device__ __forceinline__ void store_tile(float* to, unsigned row, unsigned rows, unsigned col, unsigned cols,
                                           bool add, const Accumulators<TILE, MATH>& acc) {
#pragma unroll
    for (int q = 0; q < acc.ACROSS; ++q) {
        const Four four(col + acc.col(q), cols);
        if (four.count == 0) return;
#pragma unroll
        for (int i = 0; i < acc.ROWS; ++i) {
            if (row + acc.row(i) >= rows) break;
            float* p = to + (size_t)(row + acc.row(i)) * cols + four.col;
            const float4 v = acc.quad(i, q);
            four.write(p, add ? four.read(p) + v : v);
        }
    }
}
