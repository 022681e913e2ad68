// loss: L_simple, its gradient and its sums by quarter of the timesteps in one kernel; the noise is redrawn, not read.
//
// computes   d_ik = y_ik - z_ik;  dy_ik = factor d_ik (unless dy is null);  L_i = sum_k d_ik^2 / image;
//            loss_sums[q] += L_i and counts[q] += 1 in the meter's row, for each image's quarter
//            q = QUARTERS t_i / timesteps; if accumulate is 0, the row's sums and counts are overwritten
// layout     y, dy (n, h, w, c) f32 or bf16; t (n) f32; rows as in meter.cuh; partial (n, chunks) f64; done one word, 0
//            before and after
// mapping    block = CHUNK elements of one image, thread = 4 neighbours at a time; grid (chunks, n). The block that
//            finishes last adds the partial sums to the row
// shared     68 B: the warps' sums (block_sum), and whether this block is the last
// bound by   arithmetic (Philox and Box-Muller), with 2 to 8 bytes moved per element
// host       n <= 65535, image < 2^34; the clock is null or the step's (clock.cuh)
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
    __syncthreads();  // `last` written above is read below
    if (!last || threadIdx.x != 0) return;
    MeterRow* row = row_of_step(rows, clock);
    double sums[QUARTERS], counts[QUARTERS];
#pragma unroll
    for (int q = 0; q < QUARTERS; ++q) {
        sums[q] = accumulate ? row->loss_sums[q] : 0.0;
        counts[q] = accumulate ? row->counts[q] : 0.0;
    }
    for (unsigned j = 0; j < n; ++j) {
        double of_image = 0.0;
        for (unsigned chunk = 0; chunk < chunks; ++chunk) of_image += partial[size_t(j) * chunks + chunk];
        const unsigned quarter = QUARTERS * unsigned(t[j]) / timesteps;
        // Loops over every quarter, so that the arrays stay in registers.
#pragma unroll
        for (int q = 0; q < QUARTERS; ++q) {
            sums[q] += q == quarter ? of_image / double(image) : 0.0;
            counts[q] += q == quarter ? 1.0 : 0.0;
        }
    }
#pragma unroll
    for (int q = 0; q < QUARTERS; ++q) {
        row->loss_sums[q] = sums[q];
        row->counts[q] = counts[q];
    }
    *done = 0;
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
