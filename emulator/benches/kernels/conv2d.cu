// The 128x128 tile of the forward convolution of ../../../kernels/conv2d.cu, as an entry of its own.
// Host guarantees: as there; grid = tiles of 128 pixels x 128 channels, 128 threads.
#include "conv2d_mma.cuh"

using Large = mma::Tile<128, 128, 64, 64>;

extern "C" __global__ void __launch_bounds__(Large::THREADS) conv2d(
    bf16* y, const bf16* x, const bf16* x_second, const bf16* weight, const float* bias, const bf16* shift,
    const bf16* residual, unsigned halved, const bf16* s, const bf16* s_second, const bf16* s_weight,
    const float* s_bias, Geometry g) {
    mma::forward<Large, mma::Unit::BLOCK, false>(y, nullptr, x, x_second, weight, {s, s_second, s_weight},
        {bias, shift, residual, halved, s_bias}, g, 0);
}
