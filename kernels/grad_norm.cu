// grad_norm: the norm of all gradients and what follows from it, without a round trip to the host.
//
// computes   fwd: norm = sqrt(sum g^2) and clip = min(1, max_norm / (norm + 1e-6)), or 1 if max_norm is 0, both written
//            to the meter's row; sets *halt if the norm or a loss of the step's micro_batches rows is not finite. Then
//            no later update is applied until the host clears it
//            squares: the sum of squares of each chunk of a shard; the first is NaN if such a loss is not finite
//            join: fwd from these sums
// layout     g (len) f32; rows as in meter.cuh, norm and clip in the step's first; partial one f64 per block, of join
//            (count); done one word, 0 before and after; halt one word
// mapping    block = CHUNK elements, thread = 4 neighbours at a time; the block that finishes last adds the partial
//            sums; join: one block
// shared     68 B: the warps' sums (block_sum), and whether this block is the last; squares and join 64 B: the sums
// bound by   memory: 4 bytes read per element, and 2.25 instructions in f64. An RTX 4090 does 645 G of these a second
//            (1/64 of its f32 rate) and reads 252 G elements: f64 takes 0.88 of the memory's time there. On an RTX 3090
//            (279 G, 234 G elements) it takes 1.9 of it, 0.3 ms for the 36 M gradients of `cifar10`. Sums in f32 would
//            be accurate enough but overflow where no gradient does. join: latency
// host       g starts on a 16-byte boundary; len is a multiple of 4 (the flat buffer's gaps are zero); the clock is
//            null or the step's (clock.cuh). squares: no loss is written meanwhile; the grid may reach beyond len
// numerics   squares and sums in f64 in a fixed order; the square of an f32 does not overflow an f64, so the norm is
//            finite if and only if every gradient is. join has the bits of fwd, also if sums of 0 follow
#include "clock.cuh"
#include "meter.cuh"
#include "reduce.cuh"

// Host twin: elements per block: sixteen rounds of 256 threads with four elements each.
constexpr size_t CHUNK = 16384;

// Whether all losses of the step's micro-batches are finite.
__device__ __forceinline__ bool losses_are_finite(const MeterRow* row, unsigned micro_batches) {
    bool finite = true;
    for (unsigned k = 0; k < micro_batches; ++k) {
        for (int q = 0; q < QUARTERS; ++q) finite = finite && isfinite(row[k].loss_sums[q]);
    }
    return finite;
}

// Sum of squares of the block's chunk of g (len); every thread gets it.
__device__ __forceinline__ double chunk_sum(const float* g, size_t len, double* scratch) {
    const size_t end = min((blockIdx.x + 1) * CHUNK, len);
    double sum = 0.0;
    for (size_t i = blockIdx.x * CHUNK + 4 * threadIdx.x; i < end; i += 4 * THREADS) {
        const float4 v = *reinterpret_cast<const float4*>(g + i);
        sum += double(v.x) * v.x + double(v.y) * v.y + double(v.z) * v.z + double(v.w) * v.w;
    }
    return block_sum<THREADS>(sum, scratch);
}

// Sum of the chunks' sums, by one block; every thread gets it.
__device__ __forceinline__ double sum_of_chunks(const double* partial, unsigned count, double* scratch) {
    double total = 0.0;
    for (unsigned i = threadIdx.x; i < count; i += THREADS) total += partial[i];
    return block_sum<THREADS>(total, scratch);
}

// Writes norm and clipping factor to the step's row, by one thread.
__device__ __forceinline__ void note(MeterRow* row, unsigned* halt, double total, double max_norm, bool finite) {
    const double norm = sqrt(total);
    const double factor = max_norm / (norm + 1e-6);
    row->grad_norm = norm;
    row->clip = max_norm == 0.0 || factor > 1.0 ? 1.0 : factor;
    if (!finite || !isfinite(norm)) *halt = 1;
}

extern "C" __global__ void __launch_bounds__(THREADS) grad_norm_fwd(
    MeterRow* rows, unsigned* halt, double* partial, unsigned* done, const float* g, size_t len,
    unsigned micro_batches, double max_norm, const Clock* clock) {
    __shared__ double scratch[THREADS / 32];
    __shared__ unsigned last;
    const double sum = chunk_sum(g, len, scratch);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
        __threadfence();  // the partial sum is visible before the count
        last = atomicAdd(done, 1u) == gridDim.x - 1;
        __threadfence();  // if every block has counted, every partial sum is visible below
    }
    __syncthreads();  // `last` and what the other blocks wrote are read below
    if (!last) return;
    const double total = sum_of_chunks(partial, gridDim.x, scratch);
    if (threadIdx.x != 0) return;
    MeterRow* row = row_of_step(rows, clock);
    note(row, halt, total, max_norm, losses_are_finite(row, micro_batches));
    *done = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS) grad_norm_squares(
    double* partial, const MeterRow* rows, const float* g, size_t len, unsigned micro_batches, const Clock* clock) {
    __shared__ double scratch[THREADS / 32];
    const double sum = chunk_sum(g, len, scratch);
    if (threadIdx.x != 0) return;
    const bool poisoned = blockIdx.x == 0 && !losses_are_finite(row_of_step(rows, clock), micro_batches);
    partial[blockIdx.x] = poisoned ? __longlong_as_double(0x7ff8000000000000ll) : sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) grad_norm_join(
    MeterRow* rows, unsigned* halt, const double* partial, unsigned count, double max_norm, const Clock* clock) {
    __shared__ double scratch[THREADS / 32];
    const double total = sum_of_chunks(partial, count, scratch);
    if (threadIdx.x == 0) note(row_of_step(rows, clock), halt, total, max_norm, true);
}
