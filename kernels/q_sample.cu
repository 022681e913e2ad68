// q_sample: the forward process in one kernel, from the data set's bytes to x_t (DDPM, equation 4). Neither x_0 nor eps
// is stored.
//
// computes   for image i of the batch: draws t_i uniform on 0..timesteps, the flip and z normal, each from its own
//            stream; u = pixels[rows[i]], mirrored along w if flipped;  x_t[i, k] = byte_t (2u - 255) + eps_t z_k.
//            Also writes t and the labels, which are `null` where a stream's first word is below `dropped`.
//            If strata is not 0, t_i = timesteps ((u + stream_i/strata) mod 1), one u for all; if given, t holds it
// layout     pixels (images, h, w, c) u8; rows (n) u32, class_of (n) u32 or null, both from the batch's place on
//            (clock.cuh); x_t (n, h, w, c) f32 or bf16; t, labels (n) f32; table (timesteps, 2) f32:
//            byte_t = sqrt(alpha_bar_t) / 255, eps_t = sqrt(1 - alpha_bar_t)
// mapping    thread = 4 neighbours of one image = one Philox block; grid (ceil(h w c / 1024), images up to 65535,
//            looped)
// shared     12 B: timestep and flip of the image, drawn by thread 0, read by all; where in its row of the image the
//            block begins, found by thread 0 before them
// bound by   arithmetic: ten rounds of Philox and two Box-Muller pairs for 4 bytes read and 8 or 16 written
// host       rows are below the number of images, h w c < 2^34, w c < 2^31; the clock is null or the step's (clock.cuh)
// numerics   t, flip and z have the CPU's bits; one product, one fused multiply-add and one rounding to T
#include "clock.cuh"
#include "dtype.cuh"
#include "philox.cuh"

// The timestep of a stream among `strata`, for a batch of one u: the first word of stream 0.
__device__ __forceinline__ uint32_t stratum(Stream s, unsigned strata, unsigned timesteps) {
    const uint32_t place = uint32_t((uint64_t(s.stream) << 32) / strata);
    s.stream = 0;
    return __umulhi(philox(s, 0).x + place, timesteps);
}

template <class T>
__device__ __forceinline__ void fwd(T* x_t, float* t, float* labels, const unsigned char* pixels, const unsigned* rows,
                                    const unsigned* class_of, const float* table, unsigned n, size_t image, unsigned w,
                                    unsigned c, unsigned timesteps, const Stream& noise, uint32_t purpose_t,
                                    uint32_t purpose_flip, unsigned flip, unsigned strata, unsigned given,
                                    uint32_t purpose_drop, uint32_t dropped, unsigned null, const Clock* clock) {
    __shared__ uint32_t drawn[2];
    __shared__ unsigned start;
    // The one division of a full index; the threads divide what is left, of a row and a block.
    const unsigned row = w * c;
    if (threadIdx.x == 0) start = unsigned(size_t(blockIdx.x) * (4 * THREADS) % row);
    const size_t block = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const Stream streams = of_step(noise, clock);
    const unsigned* row_of = of_place(rows, clock);
    for (unsigned i = blockIdx.y; i < n; i += gridDim.y) {
        const Stream stream = of_image(streams, i);
        if (threadIdx.x == 0) {
            drawn[0] = given       ? uint32_t(t[i])
                       : strata > 0 ? stratum(for_purpose(stream, purpose_t), strata, timesteps)
                                    : below(for_purpose(stream, purpose_t), timesteps);
            drawn[1] = flip ? below(for_purpose(stream, purpose_flip), 2) : 0;
        }
        __syncthreads();  // the draws above and `start` are read below
        const uint32_t t_i = drawn[0];
        const bool mirrored = drawn[1] == 1;
        __syncthreads();  // all have read before the next image's draws
        if (block == 0) {
            if (!given) t[i] = float(t_i);
            if (class_of != nullptr) {
                const bool drop = dropped > 0 && philox(for_purpose(stream, purpose_drop), 0).x < dropped;
                labels[i] = float(drop ? null : of_place(class_of, clock)[i]);
            }
        }
        if (4 * block >= image) continue;
        const float byte_t = table[2 * t_i], eps_t = table[2 * t_i + 1];
        const float4 z = normals(stream, uint32_t(block));
        const unsigned char* u = pixels + size_t(row_of[i]) * image;
        const unsigned count = unsigned(min(size_t(4), image - 4 * block));
        const float noise[4] = {z.x, z.y, z.z, z.w};
        unsigned char bytes[4] = {0, 0, 0, 0};
        if (mirrored) {
            const unsigned place = (start + 4 * threadIdx.x) % row;
            unsigned x = place / c, channel = place % c;
#pragma unroll
            for (unsigned j = 0; j < 4; ++j) {
                // Goes back by unsigned wraparound.
                if (j < count) bytes[j] = u[4 * block + j + (size_t(w) - 1 - 2 * size_t(x)) * c];
                if (++channel == c) {
                    channel = 0;
                    if (++x == w) x = 0;
                }
            }
        } else if (image % 4 == 0) {
            const uchar4 four = *reinterpret_cast<const uchar4*>(u + 4 * block);
            bytes[0] = four.x, bytes[1] = four.y, bytes[2] = four.z, bytes[3] = four.w;
        } else {
#pragma unroll
            for (unsigned j = 0; j < 4; ++j)
                if (j < count) bytes[j] = u[4 * block + j];
        }
        float v[4];
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            v[j] = fmaf(byte_t, float(2 * int(bytes[j]) - 255), __fmul_rn(eps_t, noise[j]));
        }
        store_group(x_t, size_t(i) * image + 4 * block, make_float4(v[0], v[1], v[2], v[3]), count, image % 4 == 0);
    }
}

// q_sample_fwd_f32, q_sample_fwd_bf16
#define ENTRY(suffix, T) \
    extern "C" __global__ void __launch_bounds__(THREADS) q_sample_fwd_##suffix( \
        T* x_t, float* t, float* labels, const unsigned char* pixels, const unsigned* rows, const unsigned* class_of, \
        const float* table, unsigned n, size_t image, unsigned w, unsigned c, unsigned timesteps, Stream noise, \
        unsigned purpose_t, unsigned purpose_flip, unsigned flip, unsigned strata, unsigned given, \
        unsigned purpose_drop, unsigned dropped, unsigned null, const Clock* clock) { \
        fwd(x_t, t, labels, pixels, rows, class_of, table, n, image, w, c, timesteps, noise, purpose_t, purpose_flip, \
            flip, strata, given, purpose_drop, dropped, null, clock); \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
