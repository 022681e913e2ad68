// loss: L_simple, its gradient and its sums by timestep in one kernel; the noise is drawn again instead of read.
//
// computes   d_ik = y_ik - z_ik;  dy_ik = factor d_ik (unless dy is null);  L_i = sum_k d_ik^2 / image;
//            row[b] += L_i and row[BINS + b] += 1 for the bin b = BINS t_i / timesteps of each image
// layout     y, dy (n, h, w, c) f32 or bf16; t (n) f32; row 2 BINS f64; partial (n, chunks) f64; done one word, 0 before and after
// mapping    block = CHUNK elements of one image, thread = 4 neighbours at a time; grid (chunks, n). The block that finishes last adds the
//            partial sums to the row
// shared     72 B: sums of the warps (block_sum), and whether this block is the last
// bound by   arithmetic (Philox and Box-Muller), with 4 to 8 bytes moved an element
// host       n <= 65535, image < 2^34
// numerics   z has the bits of the CPU's; differences in f32, squares and sums in f64, each in a fixed order, whichever block is last
#include "dtype.cuh"
#include "philox.cuh"
#include "reduce.cuh"

constexpr int THREADS = 256;
constexpr size_t CHUNK = 4096;
constexpr int BINS = 4;

template <class T>
__device__ __forceinline__ void fwd(T* dy, double* row, double* partial, unsigned* done, const T* y, const float* t,
                                    size_t image, unsigned timesteps, float factor, uint32_t seed_lo, uint32_t seed_hi,
                                    uint32_t step, uint32_t purpose, uint32_t stream, unsigned accumulate) {
    __shared__ double scratch[THREADS / 32];
    __shared__ unsigned last;
    const unsigned i = blockIdx.y, n = gridDim.y, chunks = gridDim.x;
    double sum = 0.0;
    for (size_t first = blockIdx.x * CHUNK + 4 * threadIdx.x; first < min((blockIdx.x + 1) * CHUNK, image); first += 4 * THREADS) {
        const float4 z = normals(Stream{seed_lo, seed_hi, step, purpose, stream + i}, uint32_t(first / 4));
        const size_t at = size_t(i) * image + first;
        const unsigned count = unsigned(min(size_t(4), image - first));
        float4 d = load_group(y, at, count, image % 4 == 0);
        d = make_float4(d.x - z.x, d.y - z.y, d.z - z.z, d.w - z.w);
        sum += double(d.x) * double(d.x);
        if (count > 1) sum += double(d.y) * double(d.y);
        if (count > 2) sum += double(d.z) * double(d.z);
        if (count > 3) sum += double(d.w) * double(d.w);
        d = make_float4(factor * d.x, factor * d.y, factor * d.z, factor * d.w);
        if (dy != nullptr) store_group(dy, at, d, count, image % 4 == 0);
    }
    sum = block_sum<THREADS>(sum, scratch);
    if (threadIdx.x == 0) {
        partial[size_t(i) * chunks + blockIdx.x] = sum;
        __threadfence();  // the partial sum is there before the count says so
        last = atomicAdd(done, 1u) == n * chunks - 1;
        __threadfence();  // if every block has counted, every partial sum is there for what follows
    }
    __syncthreads();  // `last` written above is read below
    if (!last || threadIdx.x != 0) return;
    double bins[2 * BINS];
#pragma unroll
    for (int b = 0; b < 2 * BINS; ++b) bins[b] = accumulate ? row[b] : 0.0;
    for (unsigned j = 0; j < n; ++j) {
        double of_image = 0.0;
        for (unsigned chunk = 0; chunk < chunks; ++chunk) of_image += partial[size_t(j) * chunks + chunk];
        const unsigned bin = BINS * unsigned(t[j]) / timesteps;
        // Every bin is visited so that the array stays in registers.
#pragma unroll
        for (int b = 0; b < BINS; ++b) {
            bins[b] += b == bin ? of_image / double(image) : 0.0;
            bins[BINS + b] += b == bin ? 1.0 : 0.0;
        }
    }
#pragma unroll
    for (int b = 0; b < 2 * BINS; ++b) row[b] = bins[b];
    *done = 0;
}

#define ENTRY(suffix, T)                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) loss_fwd_##suffix(                                                 \
        T* dy, double* row, double* partial, unsigned* done, const T* y, const float* t, size_t image, unsigned timesteps, \
        float factor, unsigned seed_lo, unsigned seed_hi, unsigned step, unsigned purpose, unsigned stream,              \
        unsigned accumulate) {                                                                                           \
        fwd(dy, row, partial, done, y, t, image, timesteps, factor, seed_lo, seed_hi, step, purpose, stream, accumulate); \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
