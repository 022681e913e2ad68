// loss: L_simple, its gradient and its sums by quarter of the timesteps in one kernel; the noise is redrawn, not read.
//
// computes   d_ik = y_ik - z_ik;  dy_ik = factor d_ik (unless dy is null);  L_i = sum_k d_ik^2 / image;
//            loss_sums[q] += L_i and counts[q] += 1 in the meter's row, for each image's quarter
//            q = QUARTERS t_i / timesteps; if accumulate is 0, the row's sums and counts are overwritten
// layout     y, dy (n, h, w, c) f32 or bf16; t (n) f32; rows as in meter.cuh; partial (n, chunks) f64; done one word, 0
//            before and after
// mapping    block = CHUNK elements of one image, thread = 4 neighbours at a time; grid (chunks, n). The block that
//            finishes last adds the partial sums to the row: thread = every THREADS-th of them, by quarter; then thread
//            q = quarter q of the losses, thread QUARTERS + q of the counts
// shared     580 B: the warps' sums of a chunk (block_sum), whether this block is the last, and the warps' sums of
//            losses and counts by quarter, written by each warp's first lane and read by the first threads
// bound by   latency for the small images of a training step. Beyond: 2 to 8 bytes moved per element, and two
//            instructions in f64, a conversion and an FMA. An RTX 4090 does 645 G of these a second (1/64 of its f32
//            rate) and moves 1008 GB/s: f64 takes 0.4 of the time of an f32 step's memory, 0.8 of a bf16 step's, and
//            1.6 of a bf16 validation's, which has no gradient. The last is no reason for sums in f32, which a finite
//            prediction could overflow
// host       n <= 65535, image < 2^34, n chunks < 2^31; the clock is null or the step's (clock.cuh)
// numerics   z has the CPU's bits; differences in f32, squares and sums in f64, in a fixed order whichever block
//            finishes last
#include "clock.cuh"
#include "dtype.cuh"
#include "meter.cuh"
#include "philox.cuh"
#include "reduce.cuh"

// Host twin: elements of an image per block: four rounds of 256 threads with four elements each, so that block_sum
// costs little in comparison.
constexpr size_t CHUNK = 4096;

template <class T>
__device__ __forceinline__ void fwd(T* dy, MeterRow* rows, double* partial, unsigned* done, const T* y, const float* t,
                                    size_t image, unsigned timesteps, float factor, const Stream& noise,
                                    unsigned accumulate, const Clock* clock) {
    __shared__ double scratch[THREADS / 32];
    __shared__ unsigned last;
    __shared__ double by_warp[THREADS / 32][2 * QUARTERS];
    const unsigned i = blockIdx.y, n = gridDim.y, chunks = gridDim.x;
    const Stream stream = of_image(of_step(noise, clock), i);
    const size_t end = min((blockIdx.x + 1) * CHUNK, image);
    double sum = 0.0;
    for (size_t first = blockIdx.x * CHUNK + 4 * threadIdx.x; first < end; first += 4 * THREADS) {
        const float4 z = normals(stream, uint32_t(first / 4));
        const size_t offset = size_t(i) * image + first;
        const unsigned count = unsigned(min(size_t(4), image - first));
        float4 d = load_group(y, offset, count, image % 4 == 0);
        d = make_float4(d.x - z.x, d.y - z.y, d.z - z.z, d.w - z.w);
        sum += double(d.x) * double(d.x);
        if (count > 1) sum += double(d.y) * double(d.y);
        if (count > 2) sum += double(d.z) * double(d.z);
        if (count > 3) sum += double(d.w) * double(d.w);
        d = make_float4(factor * d.x, factor * d.y, factor * d.z, factor * d.w);
        if (dy != nullptr) store_group(dy, offset, d, count, image % 4 == 0);
    }
    sum = block_sum<THREADS>(sum, scratch);
    if (threadIdx.x == 0) {
        partial[size_t(i) * chunks + blockIdx.x] = sum;
        __threadfence();  // the partial sum is visible before the count
        last = atomicAdd(done, 1u) == n * chunks - 1;
        __threadfence();  // if every block has counted, every partial sum is visible below
    }
    __syncthreads();  // `last` and what the other blocks wrote are read below
    if (!last) return;
    double sums[2 * QUARTERS] = {};  // by quarter: losses times image, then how many
    for (unsigned p = threadIdx.x; p < n * chunks; p += THREADS) {
        const double of_chunk = partial[p];
        const unsigned j = p / chunks, quarter = QUARTERS * unsigned(t[j]) / timesteps;
        // Loops over every quarter, so that the array stays in registers.
#pragma unroll
        for (int q = 0; q < QUARTERS; ++q) {
            sums[q] += q == quarter ? of_chunk : 0.0;
            sums[QUARTERS + q] += q == quarter && p == j * chunks ? 1.0 : 0.0;
        }
    }
#pragma unroll
    for (int k = 0; k < 2 * QUARTERS; ++k) {
        sums[k] = warp_sum(sums[k]);
        if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32][k] = sums[k];
    }
    __syncthreads();  // the warps' sums written above are read below
    const unsigned k = threadIdx.x;
    if (k >= 2 * QUARTERS) return;
    double total = by_warp[0][k];
    for (int w = 1; w < THREADS / 32; ++w) total += by_warp[w][k];
    if (k < QUARTERS) total /= double(image);
    MeterRow* row = row_of_step(rows, clock);
    double* to = k < QUARTERS ? &row->loss_sums[k] : &row->counts[k - QUARTERS];
    *to = accumulate ? *to + total : total;
    if (k == 0) *done = 0;
}

// loss_fwd_f32, loss_fwd_bf16
#define ENTRY(suffix, T) \
    extern "C" __global__ void __launch_bounds__(THREADS) loss_fwd_##suffix( \
        T* dy, MeterRow* rows, double* partial, unsigned* done, const T* y, const float* t, size_t image, \
        unsigned timesteps, float factor, Stream noise, unsigned accumulate, const Clock* clock) { \
        fwd(dy, rows, partial, done, y, t, image, timesteps, factor, noise, accumulate, clock); \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
