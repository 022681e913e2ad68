// loss: a training loss, its gradient and its sums by quarter of the timesteps in one kernel; the noise is redrawn and
// x_0 made from its bytes again, neither is read. fwd is L_simple of eps; any is every other loss (src/ops/loss.rs);
// terms measures the bound and the error of x_0 without a gradient; schedule takes the sums of which the derivative of
// the bound by the noise schedule is made.
//
// computes   fwd: d_ik = y_ik - z_ik;  dy_ik = factor d_ik (unless dy is null);  L_i = sum_k d_ik^2 / image;
//            loss_sums[q] += L_i and counts[q] += 1 in the meter's row, for each image's quarter
//            q = QUARTERS t_i / timesteps; if accumulate is 0, the row's sums and counts are overwritten
//            any: with r = table[t_i] and u the byte of element k, mirrored if the image is,
//                d = y - (r.byte (2u - 255) + r.eps z);  l = the bound's term at z = r.mean_error d and
//                delta = -(r.shift + r.scale v);
//                L_i = (r.squared sum d^2 + r.bound sum l) / image weights_i, and likewise dy, dv and
//                vlb_sum += terms sum l / image weights_i
//            terms: partial = (sum l, sum e^2), e the error of x_0, which is clipped to +-range if clip is set, or with
//                limits to +-limits_i and then divided by it, and the mean with it unless clip is KEEP_MEAN
//            schedule: partial = sums of dz d, dz x_0, dz z_ik, ddelta, ddelta v, dx x_0 and dx z_ik, with dz and
//                ddelta the derivatives of l by z and delta
// layout     y, dy (n, h, w, c) f32 or bf16, if doubled (n, h, w, 2c), v behind y in each pixel; t, weights (n) f32,
//            weights may be null; rows as in meter.cuh; partial (n, chunks) f64, of any and terms (n, chunks, 2), of
//            schedule (n, chunks, SUMS); dx (n, h, w, c) of y's type; done one word, 0 before and after; pixels,
//            indices as in q_sample.cu; table (timesteps) rows; limits (n) f32, may be null
// mapping    block = CHUNK elements of one image, thread = 4 neighbours at a time; grid (chunks, n). The block that
//            finishes last adds the partial sums to the row: thread = every THREADS-th of them, by quarter; then thread
//            q = quarter q of the losses, thread QUARTERS + q of the counts
// shared     fwd 580 B, any 644, terms and schedule 64: the warps' sums of a chunk (block_sum), whether this block is
//            the last, and the warps' sums of losses and counts by quarter and of the bound, written by each warp's
//            first lane and read by the first threads
// bound by   latency for the small images of a training step. Beyond: 2 to 8 bytes moved per element, and two
//            instructions in f64, a conversion and an FMA. An RTX 4090 does 645 G of these a second (1/64 of its f32
//            rate) and moves 1008 GB/s: f64 takes 0.4 of the time of an f32 step's memory, 0.8 of a bf16 step's, and
//            1.6 of a bf16 validation's, which has no gradient. The last is no reason for sums in f32, which a finite
//            prediction could overflow
//            any, terms and schedule: two exponentials and two logarithms per element in f32 for the bound; they
//            divide an index per four elements by c and w, of mirrored images and doubled outputs alone
// host       n <= 65535, image < 2^34 (any, terms, schedule: 2^31), n chunks < 2^31; the clock is null or the
//            step's (clock.cuh)
// numerics   z has the CPU's bits; differences and terms of the bound in f32, squares and sums in f64, in a fixed order
//            whichever block finishes last
#include "clock.cuh"
#include "dtype.cuh"
#include "meter.cuh"
#include "philox.cuh"
#include "reduce.cuh"

// Host twin: elements of an image per block: four rounds of 256 threads with four elements each, so that block_sum
// costs little in comparison.
constexpr size_t CHUNK = 4096;

// Whether this block is the last of the grid to get here. What each block wrote before is visible to the last one.
__device__ __forceinline__ bool is_last(unsigned* done) {
    __shared__ unsigned last;
    if (threadIdx.x == 0) {
        __threadfence();  // the partial sum is visible before the count
        last = atomicAdd(done, 1u) == gridDim.x * gridDim.y - 1;
        __threadfence();  // if every block has counted, every partial sum is visible below
    }
    __syncthreads();  // `last` and what the other blocks wrote are read below
    return last;
}

// Adds the sums of all chunks to the step's row: of_chunk(p, image) is the loss of chunk p of all and, if VLB, the
// bound in y. By the last block.
template <bool VLB, class F>
__device__ __forceinline__ void add_to_row(MeterRow* rows, unsigned* done, const float* t, size_t image,
                                           unsigned timesteps, unsigned accumulate, const Clock* clock, F of_chunk) {
    constexpr int SUMS = 2 * QUARTERS + (VLB ? 1 : 0);
    __shared__ double by_warp[THREADS / 32][SUMS];
    const unsigned n = gridDim.y, chunks = gridDim.x;
    double sums[SUMS] = {};  // by quarter: losses times image, then how many; then the bound times image
    for (unsigned p = threadIdx.x; p < n * chunks; p += THREADS) {
        const unsigned j = p / chunks, quarter = QUARTERS * unsigned(t[j]) / timesteps;
        const double2 chunk = of_chunk(p, j);
        // Loops over every quarter, so that the array stays in registers.
#pragma unroll
        for (int q = 0; q < QUARTERS; ++q) {
            sums[q] += q == quarter ? chunk.x : 0.0;
            sums[QUARTERS + q] += q == quarter && p == j * chunks ? 1.0 : 0.0;
        }
        if (VLB) sums[SUMS - 1] += chunk.y;
    }
#pragma unroll
    for (int k = 0; k < SUMS; ++k) {
        sums[k] = warp_sum(sums[k]);
        if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32][k] = sums[k];
    }
    __syncthreads();  // the warps' sums written above are read below
    const unsigned k = threadIdx.x;
    if (k >= SUMS) return;
    double total = by_warp[0][k];
    for (int w = 1; w < THREADS / 32; ++w) total += by_warp[w][k];
    if (k < QUARTERS || k >= 2 * QUARTERS) total /= double(image);
    MeterRow* row = row_of_step(rows, clock);
    double* to = k < QUARTERS       ? &row->loss_sums[k]
                 : k < 2 * QUARTERS ? &row->counts[k - QUARTERS]
                                    : &row->vlb_sum;
    *to = accumulate ? *to + total : total;
    if (k == 0) *done = 0;
}

template <class T>
__device__ __forceinline__ void fwd(T* dy, MeterRow* rows, double* partial, unsigned* done, const T* y, const float* t,
                                    size_t image, unsigned timesteps, float factor, const Stream& noise,
                                    unsigned accumulate, const Clock* clock) {
    __shared__ double scratch[THREADS / 32];
    const unsigned i = blockIdx.y, chunks = gridDim.x;
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
    if (threadIdx.x == 0) partial[size_t(i) * chunks + blockIdx.x] = sum;
    if (!is_last(done)) return;
    add_to_row<false>(rows, done, t, image, timesteps, accumulate, clock,
                      [&](unsigned p, unsigned) { return make_double2(partial[p], 0.0); });
}

// Host twin: the factors of one timestep, as derived in src/diffusion/objective.rs.
struct Row {
    float byte, eps;     // factors of 2u - 255 and of eps in the target
    float squared;       // weight of d^2 in the loss
    float bound;         // weight of the bound's term in the loss
    float bound_mean;    // the same for the gradient that reaches the mean
    float x_0_error;     // error of x_0 for d = 1
    float mean_of_x_0;   // difference of the means for an error of x_0 of 1, in standard deviations of q
    float mean_error;    // the same for d = 1
    float shift, scale;  // the log variance of p minus that of q is shift + scale v
    float half_bin;      // half a bin of the decoder in standard deviations; 0 where there is none
    float unused;        // sixteen bytes times three
};

// Host twin: the mean is of the clipped x_0, too.
constexpr unsigned CLIP = 1;

// Host twin: the mean is what the network says.
constexpr unsigned KEEP_MEAN = 2;

// A term of the bound in nats and its derivatives by z and delta.
struct Term {
    float nats, dz, ddelta;
};

// The divergence of q from p, whose means differ by z standard deviations of q and log variances by delta.
__device__ __forceinline__ Term divergence(float z, float delta) {
    const float expm1 = expm1f(delta), square = z * z * (expm1 + 1.0f);
    return {0.5f * ((expm1 - delta) + square), z * (expm1 + 1.0f), 0.5f * (expm1 + square)};
}

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The decoder: -ln of the probability of byte u, whose bin is half_bin around x_0, z beside the mean. With the normal
// distribution approximated by sigmoid(g(x)), g(x) = C (x + CUBE x^3), the difference of two of its values is
// sigmoid(a) sigmoid(-b) (1 - exp(b - a)), which cancels nowhere.
__device__ __forceinline__ Term decoder(float z, float delta, float half_bin, unsigned char u) {
    constexpr float C = 1.59576912f;  // 2 sqrt(2 / pi)
    constexpr float CUBE = 0.044715f, LEAST = 27.6310211f;
    const float r = expf(0.5f * delta), upper = r * (half_bin - z), lower = r * (-half_bin - z);
    const float a = C * upper * (1.0f + CUBE * upper * upper), b = C * lower * (1.0f + CUBE * lower * lower);
    const float width = 2.0f * r * half_bin, squares = upper * upper + upper * lower + lower * lower;
    const float apart = C * width * (1.0f + CUBE * squares);  // a - b
    const bool first = u == 0, last = u == 255;
    float nats = 0.0f, dupper = 0.0f, dlower = 0.0f, dz = 0.0f, ddelta = 0.0f;
    if (!last) {
        nats += softplus(-a);
        dupper = -sigmoid(-a) * C * (1.0f + 3.0f * CUBE * upper * upper);
    }
    if (!first) {
        nats += softplus(b);
        dlower = sigmoid(b) * C * (1.0f + 3.0f * CUBE * lower * lower);
    }
    dz = -r * (dupper + dlower);
    ddelta = 0.5f * (dupper * upper + dlower * lower);
    if (!first && !last) {
        nats -= logf(-expm1f(-apart));
        const float slope = C * width / expm1f(apart);
        dz += r * slope * 3.0f * CUBE * (upper + lower);
        ddelta -= 0.5f * slope * (1.0f + 3.0f * CUBE * squares);
    }
    // The floor has no slope. What is not a number stays that.
    if (nats > LEAST) return {LEAST, 0.0f, 0.0f};
    return {nats, dz, ddelta};
}

// Where the numbers of an image's elements first to first + 3 lie: the prediction in an output of `stride` channels,
// and the bytes.
struct Places {
    unsigned output[4];
    unsigned byte[4];
    __device__ Places(unsigned first, unsigned w, unsigned c, unsigned stride, bool mirrored) {
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) output[j] = byte[j] = first + j;
        if (!mirrored && stride == c) return;
        unsigned pixel = first / c, channel = first % c, x = pixel % w;
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            output[j] = pixel * stride + channel;
            // Goes back by unsigned wraparound.
            if (mirrored) byte[j] = first + j + (w - 1 - 2 * x) * c;
            if (++channel == c) {
                channel = 0;
                ++pixel;
                if (++x == w) x = 0;
            }
        }
    }
};

// One element of an image as a loss sees it.
struct Difference {
    unsigned k, at;           // its place in the image and in the output
    float d, delta, x_0, z;   // z: the noise
    unsigned char u;
};

// Calls f(Difference) for the block's elements of its image.
template <class T, class F>
__device__ __forceinline__ void each_difference(const T* y, const float* t, const unsigned char* pixels,
                                                const unsigned* indices, const Row& row, unsigned image, unsigned w,
                                                unsigned c, unsigned doubled, bool needs_bytes, const Stream& stream,
                                                bool mirrored, F f) {
    const unsigned stride = doubled ? 2 * c : c;
    const T* y_i = y + size_t(blockIdx.y) * image * (doubled ? 2 : 1);
    const unsigned char* u_i = needs_bytes ? pixels + size_t(indices[blockIdx.y]) * image : nullptr;
    const unsigned end = unsigned(min((blockIdx.x + 1) * CHUNK, size_t(image)));
    for (unsigned first = blockIdx.x * unsigned(CHUNK) + 4 * threadIdx.x; first < end; first += 4 * THREADS) {
        const float4 four = normals(stream, first / 4);
        const float z[4] = {four.x, four.y, four.z, four.w};
        const Places places(first, w, c, stride, mirrored);
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            if (first + j >= image) break;
            const unsigned char u = needs_bytes ? u_i[places.byte[j]] : 0;
            const float x_0 = float(2 * int(u) - 255);  // times 255
            const unsigned at = places.output[j];
            const float d = load(y_i + at) - fmaf(row.byte, x_0, row.eps * z[j]);
            const float delta = -(doubled ? fmaf(row.scale, load(y_i + at + c), row.shift) : row.shift);
            f(Difference{first + j, at, d, delta, x_0 / 255.0f, z[j], u});
        }
    }
}

template <class T>
__device__ __forceinline__ void any(T* dy, MeterRow* rows, double* partial, unsigned* done, const T* y, const float* t,
                                    const unsigned char* pixels, const unsigned* indices, const Row* table,
                                    const float* weights, unsigned image, unsigned w, unsigned c, unsigned doubled,
                                    unsigned timesteps, double terms, float factor, const Stream& noise,
                                    uint32_t purpose_flip, unsigned flip, unsigned accumulate, const Clock* clock) {
    __shared__ double scratch[THREADS / 32];
    const unsigned i = blockIdx.y, chunks = gridDim.x;
    const Stream stream = of_image(of_step(noise, clock), i);
    const bool mirrored = flip && below(for_purpose(stream, purpose_flip), 2) == 1;
    const Row row = table[unsigned(t[i])];
    const bool has_bound = row.bound != 0.0f, needs_bytes = row.byte != 0.0f || (has_bound && row.half_bin != 0.0f);
    const float scaled = weights != nullptr ? factor * weights[i] : factor;
    T* dy_i = dy != nullptr ? dy + size_t(i) * image * (doubled ? 2 : 1) : nullptr;
    double squares = 0.0, nats = 0.0;
    each_difference(y, t, pixels, of_place(indices, clock), row, image, w, c, doubled, needs_bytes, stream, mirrored,
                    [&](const Difference& e) {
                        const float d = e.d;
                        squares += double(d) * double(d);
                        Term term = {0.0f, 0.0f, 0.0f};
                        if (has_bound) {
                            const float z = row.mean_error * d;
                            term = row.half_bin != 0.0f ? decoder(z, e.delta, row.half_bin, e.u)
                                                        : divergence(z, e.delta);
                            nats += double(term.nats);
                        }
                        if (dy_i == nullptr) return;
                        const float by_mean = row.bound_mean * term.dz * row.mean_error;
                        store(dy_i + e.at, scaled * (2.0f * row.squared * d + by_mean));
                        if (doubled) store(dy_i + e.at + c, -scaled * row.bound * term.ddelta * row.scale);
                    });
    squares = block_sum<THREADS>(squares, scratch);
    nats = block_sum<THREADS>(nats, scratch);
    if (threadIdx.x == 0) {
        partial[2 * (size_t(i) * chunks + blockIdx.x)] = squares;
        partial[2 * (size_t(i) * chunks + blockIdx.x) + 1] = nats;
    }
    if (!is_last(done)) return;
    add_to_row<true>(rows, done, t, image, timesteps, accumulate, clock, [&](unsigned p, unsigned j) {
        const Row& of_image = table[unsigned(t[j])];
        const double weight = weights != nullptr ? double(weights[j]) : 1.0;
        const double loss = double(of_image.squared) * partial[2 * p] + double(of_image.bound) * partial[2 * p + 1];
        return make_double2(weight * loss, weight * terms * partial[2 * p + 1]);
    });
}

template <class T>
__device__ __forceinline__ void terms(double* partial, const T* y, const float* t, const unsigned char* pixels,
                                      const unsigned* indices, const Row* table, const float* limits, unsigned image,
                                      unsigned w, unsigned c, unsigned doubled, const Stream& noise,
                                      uint32_t purpose_flip, unsigned flip, unsigned clip, float range) {
    __shared__ double scratch[THREADS / 32];
    const unsigned i = blockIdx.y, chunks = gridDim.x;
    const Stream stream = of_image(noise, i);
    const bool mirrored = flip && below(for_purpose(stream, purpose_flip), 2) == 1;
    const Row row = table[unsigned(t[i])];
    const float bound = limits != nullptr ? limits[i] : range;
    double nats = 0.0, squares = 0.0;
    each_difference(y, t, pixels, indices, row, image, w, c, doubled, true, stream, mirrored,
                    [&](const Difference& e) {
                        float error = row.x_0_error * e.d, z = row.mean_error * e.d;
                        if (clip != 0) {
                            const float predicted = e.x_0 + error;
                            // Comparisons keep what is not a number.
                            if (predicted > bound) error = bound - e.x_0;
                            if (predicted < -bound) error = -bound - e.x_0;
                            if (limits != nullptr) error = (e.x_0 + error) / bound - e.x_0;
                            if (clip != KEEP_MEAN) z = row.mean_of_x_0 * error;
                        }
                        const bool decodes = row.half_bin != 0.0f;
                        const Term term = decodes ? decoder(z, e.delta, row.half_bin, e.u) : divergence(z, e.delta);
                        nats += double(term.nats);
                        squares += double(error) * double(error);
                    });
    nats = block_sum<THREADS>(nats, scratch);
    squares = block_sum<THREADS>(squares, scratch);
    if (threadIdx.x == 0) {
        partial[2 * (size_t(i) * chunks + blockIdx.x)] = nats;
        partial[2 * (size_t(i) * chunks + blockIdx.x) + 1] = squares;
    }
}

// Host twin: sums of an image that the derivative by the schedule is made of.
constexpr size_t SUMS = 7;

template <class T>
__device__ __forceinline__ void schedule(double* partial, const T* y, const T* dx, const float* t,
                                         const unsigned char* pixels, const unsigned* indices, const Row* table,
                                         unsigned image, unsigned w, unsigned c, unsigned doubled, const Stream& noise,
                                         uint32_t purpose_flip, unsigned flip, const Clock* clock) {
    __shared__ double scratch[THREADS / 32];
    const unsigned i = blockIdx.y, chunks = gridDim.x;
    const Stream stream = of_image(of_step(noise, clock), i);
    const bool mirrored = flip && below(for_purpose(stream, purpose_flip), 2) == 1;
    const Row& row = table[unsigned(t[i])];  // a copy would spill on sm_80
    const T* y_i = y + size_t(i) * image * (doubled ? 2 : 1);
    const T* dx_i = dx + size_t(i) * image;
    double sums[SUMS] = {};
    each_difference(y, t, pixels, of_place(indices, clock), row, image, w, c, doubled, true, stream, mirrored,
                    [&](const Difference& e) {
                        const float z = row.mean_error * e.d;
                        const Term term = row.half_bin != 0.0f ? decoder(z, e.delta, row.half_bin, e.u)
                                                               : divergence(z, e.delta);
                        const double v = doubled ? double(load(y_i + e.at + c)) : 0.0;
                        const double dz = term.dz, ddelta = term.ddelta, of_x_t = load(dx_i + e.k);
                        sums[0] += dz * double(e.d);
                        sums[1] += dz * double(e.x_0);
                        sums[2] += dz * double(e.z);
                        sums[3] += ddelta;
                        sums[4] += ddelta * v;
                        sums[5] += of_x_t * double(e.x_0);
                        sums[6] += of_x_t * double(e.z);
                    });
#pragma unroll
    for (unsigned k = 0; k < SUMS; ++k) {
        const double sum = block_sum<THREADS>(sums[k], scratch);
        if (threadIdx.x == 0) partial[SUMS * (size_t(i) * chunks + blockIdx.x) + k] = sum;
    }
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

// loss_any_f32, loss_any_bf16
#define ENTRY(suffix, T) \
    extern "C" __global__ void __launch_bounds__(THREADS) loss_any_##suffix( \
        T* dy, MeterRow* rows, double* partial, unsigned* done, const T* y, const float* t, \
        const unsigned char* pixels, const unsigned* indices, const Row* table, const float* weights, unsigned image, \
        unsigned w, unsigned c, unsigned doubled, unsigned timesteps, double terms, float factor, Stream noise, \
        unsigned purpose_flip, unsigned flip, unsigned accumulate, const Clock* clock) { \
        any(dy, rows, partial, done, y, t, pixels, indices, table, weights, image, w, c, doubled, timesteps, terms, \
            factor, noise, purpose_flip, flip, accumulate, clock); \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY

// loss_terms_f32, loss_terms_bf16
#define ENTRY(suffix, T) \
    extern "C" __global__ void __launch_bounds__(THREADS) loss_terms_##suffix( \
        double* partial, const T* y, const float* t, const unsigned char* pixels, const unsigned* indices, \
        const Row* table, const float* limits, unsigned image, unsigned w, unsigned c, unsigned doubled, \
        Stream noise, unsigned purpose_flip, unsigned flip, unsigned clip, float range) { \
        terms(partial, y, t, pixels, indices, table, limits, image, w, c, doubled, noise, purpose_flip, flip, clip, \
              range); \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY

// loss_schedule_f32, loss_schedule_bf16
#define ENTRY(suffix, T) \
    extern "C" __global__ void __launch_bounds__(THREADS) loss_schedule_##suffix( \
        double* partial, const T* y, const T* dx, const float* t, const unsigned char* pixels, \
        const unsigned* indices, const Row* table, unsigned image, unsigned w, unsigned c, unsigned doubled, \
        Stream noise, unsigned purpose_flip, unsigned flip, const Clock* clock) { \
        schedule(partial, y, dx, t, pixels, indices, table, image, w, c, doubled, noise, purpose_flip, flip, clock); \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
