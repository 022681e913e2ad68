// cross_entropy: the loss of a classifier, its gradient, and its sums and right answers by quarter of the timesteps.
//
// computes   m_i = max_k z_ik, s_i = sum_k exp(z_ik - m_i), p_ik = exp(z_ik - m_i) / s_i;
//            L_i = m_i - z_iy + log s_i for the image's class y; dz_ik = factor (p_ik - [k = y]) (unless dz is null);
//            unless rows is null, for each image's quarter q = QUARTERS t_i / timesteps of the meter's row:
//            loss_sums[q] += L_i, counts[q] += 1, right[q] += 1 if y is the first k with z_ik = m_i; if accumulate is
//            0, the row's sums and counts are overwritten
// layout     z, dz (n, classes) f32 or bf16; labels (n) f32, whole numbers; t (n) f32; rows as in meter.cuh; partial
//            (2, n) f64, losses and then right answers; done one word, 0 before and after. t, partial and done are null
//            if rows is
// mapping    warp = image, lane = every 32nd class; grid ceil(n / WARPS), 256 threads (philox.cuh). The block that
//            finishes last adds the images to the row: thread = every THREADS-th of them, by quarter; then thread
//            j = sum j of losses, counts and right answers by quarter
// shared     772 B: whether this block is the last, and the warps' sums by quarter, written by each warp's first lane
//            and read by the first threads
// bound by   latency: some thousand logits
// host       labels are below the number of classes, n <= 65535; the clock is null or the step's (clock.cuh)
// numerics   exponentials in f32 (expf, 2 ulp) of differences that are at most 0; their sum, its logarithm and the
//            losses in f64, so that the loss of an image that is nearly certain is right to 1e-16, not to 6e-8. An
//            image's bits do not depend on the others; sums have a fixed order whichever block finishes last. NaN in a
//            row of z makes its loss NaN
#include "clock.cuh"
#include "dtype.cuh"
#include "meter.cuh"
#include "philox.cuh"
#include "reduce.cuh"

constexpr unsigned WARPS = THREADS / 32;  // images per block
constexpr int SUMS = 3 * QUARTERS;

template <class T>
__device__ __forceinline__ void fwd(T* dz, MeterRow* rows, double* partial, unsigned* done, const T* z,
                                    const float* labels, const float* t, unsigned n, unsigned classes,
                                    unsigned timesteps, float factor, unsigned accumulate, const Clock* clock) {
    __shared__ unsigned last;
    __shared__ double by_warp[WARPS][SUMS];
    const unsigned image = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (image < n) {  // the same for all lanes of a warp
        const size_t row = size_t(image) * classes;
        const unsigned label = unsigned(labels[image]);
        float largest = load(z + row);
        for (unsigned k = lane; k < classes; k += 32) largest = fmaxf(largest, load(z + row + k));
        largest = warp_max(largest);
        double sum = 0.0;
        unsigned argmax = 0xffffffffu;
        for (unsigned k = lane; k < classes; k += 32) {
            const float of_class = load(z + row + k);
            sum += double(expf(of_class - largest));
            if (of_class == largest) argmax = min(argmax, k);
        }
        sum = warp_sum(sum);
        argmax = __reduce_min_sync(0xffffffffu, argmax);
        if (dz != nullptr) {
            const float scale = float(1.0 / sum);
            for (unsigned k = lane; k < classes; k += 32) {
                const float p = expf(load(z + row + k) - largest) * scale;
                store(dz + row + k, factor * (k == label ? p - 1.0f : p));
            }
        }
        if (rows != nullptr && lane == 0) {
            partial[image] = double(largest) - double(load(z + row + label)) + log(sum);
            partial[n + image] = argmax == label ? 1.0 : 0.0;
        }
    }
    if (rows == nullptr) return;
    __threadfence();  // what this thread wrote is visible before the block counts
    __syncthreads();  // all of the block have written, before it counts
    if (threadIdx.x == 0) {
        last = atomicAdd(done, 1u) == gridDim.x - 1;
        __threadfence();  // if every block has counted, everything is visible below
    }
    __syncthreads();  // `last` and what the other blocks wrote are read below
    if (!last) return;
    double sums[SUMS] = {};  // by quarter: losses, how many, right answers
    for (unsigned i = threadIdx.x; i < n; i += THREADS) {
        const double loss = partial[i], right = partial[n + i];
        const unsigned quarter = QUARTERS * unsigned(t[i]) / timesteps;
        // Loops over every quarter, so that the array stays in registers.
#pragma unroll
        for (int q = 0; q < QUARTERS; ++q) {
            sums[q] += q == quarter ? loss : 0.0;
            sums[QUARTERS + q] += q == quarter ? 1.0 : 0.0;
            sums[2 * QUARTERS + q] += q == quarter ? right : 0.0;
        }
    }
#pragma unroll
    for (int j = 0; j < SUMS; ++j) {
        sums[j] = warp_sum(sums[j]);
        if (lane == 0) by_warp[threadIdx.x / 32][j] = sums[j];
    }
    __syncthreads();  // the warps' sums written above are read below
    const unsigned j = threadIdx.x;
    if (j >= SUMS) return;
    double total = by_warp[0][j];
    for (unsigned w = 1; w < WARPS; ++w) total += by_warp[w][j];
    MeterRow* row = row_of_step(rows, clock);
    double* to = j < QUARTERS ? &row->loss_sums[j]
               : j < 2 * QUARTERS ? &row->counts[j - QUARTERS] : &row->right[j - 2 * QUARTERS];
    *to = accumulate ? *to + total : total;
    if (j == 0) *done = 0;
}

// cross_entropy_fwd_f32, cross_entropy_fwd_bf16
#define ENTRY(suffix, T) \
    extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy_fwd_##suffix( \
        T* dz, MeterRow* rows, double* partial, unsigned* done, const T* z, const float* labels, const float* t, \
        unsigned n, unsigned classes, unsigned timesteps, float factor, unsigned accumulate, const Clock* clock) { \
        fwd(dz, rows, partial, done, z, labels, t, n, classes, timesteps, factor, accumulate, clock); \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
