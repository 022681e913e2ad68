// dropout: y = m x scale, with a mask m that is a pure function of the Philox counter.
//
// computes   y[i,k] = x[i,k] scale if word k%4 of block k/4 of image i's stream is at least threshold, else 0; y may be
//            x. The backward pass is the same on dy.
// layout     (images, image) elements of f32 or bf16; image i's stream is `stream + i`
// mapping    thread = 4 neighbours of one image = one Philox block; grid (ceil(image/1024), images up to 65535, looped)
// shared     none
// bound by   memory, closely followed by ten rounds of Philox per four elements
// host       image < 2^34; the clock is null or the step's (clock.cuh)
// numerics   the mask is the CPU's, bit for bit; one product, one rounding to T
#include "clock.cuh"
#include "dtype.cuh"
#include "philox.cuh"

template <class T>
__device__ __forceinline__ void mask(T* y, const T* x, size_t images, size_t image, const Stream& of_masks,
                                     uint32_t threshold, float scale, const Clock* clock) {
    const size_t block = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (4 * block >= image) return;
    const unsigned count = unsigned(min(size_t(4), image - 4 * block));
    const Stream streams = of_step(of_masks, clock);
    for (size_t i = blockIdx.y; i < images; i += gridDim.y) {
        const uint4 w = philox(of_image(streams, uint32_t(i)), uint32_t(block));
        float4 v = load_group(x, i * image + 4 * block, count, image % 4 == 0);
        v.x *= w.x >= threshold ? scale : 0.0f;
        v.y *= w.y >= threshold ? scale : 0.0f;
        v.z *= w.z >= threshold ? scale : 0.0f;
        v.w *= w.w >= threshold ? scale : 0.0f;
        store_group(y, i * image + 4 * block, v, count, image % 4 == 0);
    }
}

// dropout_mask_f32, dropout_mask_bf16
#define ENTRY(suffix, T) \
    extern "C" __global__ void __launch_bounds__(THREADS) dropout_mask_##suffix( \
        T* y, const T* x, size_t images, size_t image, Stream streams, unsigned threshold, float scale, \
        const Clock* clock) { \
        mask(y, x, images, image, streams, threshold, scale, clock); \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
