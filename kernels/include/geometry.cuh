// The convolution's sizes, its taps, and the pixels that are rows of its products.
#pragma once

// Host twin: the sizes of a convolution.
struct Geometry {
    unsigned n, h, w, c_in;  // x
    unsigned oh, ow, c_out;  // y
    unsigned kh, kw;         // kernel
    unsigned stride, top, left;
};

// One dimension of a walk over the taps that reach a pixel: tap t of `taps` reads row (or column)
// i * stride + first + t, with the weight's row (or column) u + t * du.
struct Axis {
    unsigned taps, stride;
    int first, u, du;

    __device__ static Axis forward(unsigned k, unsigned stride, unsigned before) {
        return {k, stride, -(int)before, 0, 1};
    }

    // Pixels p = i s + a of dx receive dy's pixel i + (a + before - u) / s through the taps u = a + before (mod s),
    // largest u first.
    __device__ static Axis backward(unsigned a, unsigned k, unsigned s, unsigned before) {
        const unsigned smallest = (a + before) % s;
        const unsigned taps = smallest < k ? (k - 1 - smallest) / s + 1 : 0;
        const int largest = (int)(smallest + taps * s) - (int)s;
        return {taps, 1, ((int)(a + before) - largest) / (int)s, largest, -(int)s};
    }
};

// A row of the tile: the offsets, in elements, of its patch in the image batch (negative in the first image's padding)
// and of its result.
struct Pixel {
    long long patch, result;
    int i, j;
    unsigned image;
};

// The place of pixel p of y, or of the last one if there are not so many.
__device__ __forceinline__ Pixel pixel_of_y(unsigned p, const Geometry& g, const Axis& rows, const Axis& cols) {
    p = min(p, g.n * g.oh * g.ow - 1);
    const unsigned image = p / (g.oh * g.ow), rest = p % (g.oh * g.ow);
    const int i = (int)(rest / g.ow * rows.stride) + rows.first, j = (int)(rest % g.ow * cols.stride) + cols.first;
    return {(((long long)image * g.h + i) * g.w + j) * g.c_in, (long long)p * g.c_out, i, j, image};
}

// The pixels of dx in one class, (above + s i, before + s j).
struct Class {
    unsigned above, before, h, w, count;

    __device__ Class(unsigned index, const Geometry& g)
        : above(index / g.stride),
          before(index % g.stride),
          h((g.h + g.stride - 1 - above) / g.stride),
          w((g.w + g.stride - 1 - before) / g.stride),
          count(g.n * h * w) {}

    // The place of pixel p, or of the last one if there are not so many.
    __device__ __forceinline__ Pixel pixel(unsigned p, const Geometry& g, const Axis& rows, const Axis& cols) const {
        p = min(p, count - 1);
        const unsigned image = p / (h * w), rest = p % (h * w), row = rest / w, col = rest % w;
        const int i = (int)row + rows.first, j = (int)col + cols.first;
        const long long result = (((long long)image * g.h + row * g.stride + above) * g.w + col * g.stride + before);
        return {(((long long)image * g.oh + i) * g.ow + j) * g.c_out, result * g.c_in, i, j, image};
    }
};
