// The convolution's sizes, its taps, and the pixels that are rows of its products.
#pragma once
#include "dtype.cuh"

// Host twin: the sizes of a convolution.
struct Geometry {
    unsigned n, h, w, c_in;  // x
    unsigned oh, ow, c_out;  // y
    unsigned kh, kw;         // kernel
    unsigned stride, top, left;
    unsigned c_first;  // x is two tensors, its first c_first channels and the others; c_in: it is one
    unsigned up;       // 1: what is convolved is x with each pixel repeated in a 2x2 square, 2h x 2w; stride is 1 then
    unsigned s_in, s_first;  // channels of s, of which a 1x1 convolution is added to y, as for x; 0: there is none
};

// One dimension of a walk over the taps that reach a pixel: with i = index * stride + first, tap t of `taps` reads row
// (or column) i + step(t), of what is convolved, with the weight's row (or column) tap(t). The taps come in turns: one,
// but for the gradient of a repeated pixel, which two rows of y reach, each through all taps.
struct Axis {
    unsigned taps, turn, stride, up;
    int first, u, du;

    // For all pixels of y or, if x is repeated, for those with index 2 i + phase.
    __device__ static Axis forward(unsigned k, unsigned stride, unsigned before, unsigned up, unsigned phase) {
        return {k, k, stride << up, up, (int)phase - (int)before, 0, 1};
    }

    // Pixels p = i s + a of dx receive dy's pixel i + (a + before - u) / s through the taps u = a + before (mod s),
    // largest u first. If x is repeated, pixel p receives what its rows 2 p and 2 p + 1 do, one after the other.
    __device__ static Axis backward(unsigned a, unsigned k, unsigned s, unsigned before, unsigned up) {
        if (up) return {2 * k, k, 2, 0, (int)before - (int)(k - 1), (int)k - 1, -1};
        const unsigned smallest = (a + before) % s;
        const unsigned taps = smallest < k ? (k - 1 - smallest) / s + 1 : 0;
        const int largest = (int)(smallest + taps * s) - (int)s;
        return {taps, taps, 1, 0, ((int)(a + before) - largest) / (int)s, largest, -(int)s};
    }

    __device__ __forceinline__ unsigned step(unsigned t) const { return t < turn ? t : t - turn + 1; }
    __device__ __forceinline__ int tap(unsigned t) const { return u + (int)(t < turn ? t : t - turn) * du; }

    // Where tap t reads, in rows of the tensor from that of the first tap on: the same for all pixels of a class.
    __device__ __forceinline__ unsigned offset(unsigned t) const { return ((first & up) + step(t)) >> up; }
};

// A row of the tile: the row and column, in its image of what is convolved, of its patch's first tap (which may be
// outside), and the index of its result.
struct Pixel {
    unsigned image;
    int i, j;
    unsigned result;

    // The index of the first tap's pixel in a batch of images of h x w, each repeated if `up`.
    __device__ __forceinline__ int patch(unsigned h, unsigned w, unsigned up) const {
        return ((int)(image * h) + (i >> up)) * (int)w + (j >> up);
    }
};

// The pixels (above + s i, before + s j) of n images of h x w, one of s s classes.
struct Class {
    unsigned s, all_h, all_w, above, before, h, w, count;

    __device__ Class(unsigned index, unsigned s_, unsigned n, unsigned h_, unsigned w_)
        : s(s_),
          all_h(h_),
          all_w(w_),
          above(index / s),
          before(index % s),
          h((all_h + s - 1 - above) / s),
          w((all_w + s - 1 - before) / s),
          count(n * h * w) {}

    // The place of pixel p, or of the last one if there are not so many.
    __device__ __forceinline__ Pixel pixel(unsigned p, const Axis& rows, const Axis& cols) const {
        p = min(p, count - 1);
        const unsigned image = p / (h * w), rest = p % (h * w), row = rest / w, col = rest % w;
        const int i = (int)(row * rows.stride) + rows.first, j = (int)(col * cols.stride) + cols.first;
        return {image, i, j, (image * all_h + row * s + above) * all_w + col * s + before};
    }
};

// What the epilogue adds; null for none.
template <class T>
struct Plus {
    const float* bias;
    const T *shift, *residual;
    unsigned halved;      // the width of y if residual is half as high and wide as y, each pixel repeated; 0 if not
    const float* s_bias;  // of the shortcut

    // Four neighbouring sums of result `pixel`, of image `image`, and what there is to add.
    __device__ __forceinline__ float4 to(float4 v, const Four& four, unsigned image, unsigned pixel,
                                         unsigned cols) const {
        if (bias) v = v + four.read(bias + four.col);
        if (s_bias) v = v + four.read(s_bias + four.col);
        if (shift) v = v + four.read(shift + (size_t)image * cols + four.col);
        if (residual) {
            if (halved) pixel = pixel / halved / 2 * (halved / 2) + pixel % halved / 2;
            v = v + four.read(residual + (size_t)pixel * cols + four.col);
        }
        return v;
    }
};

// Results of `cols` channels: one tensor (rows, cols), or two, which hold the first c_first channels and the others.
template <class T>
struct Results {
    T *first, *second;  // second: null for one
    unsigned c_first, cols;

    __device__ __forceinline__ T* at(size_t row, unsigned col) const {
        if (!second) return first + row * cols + col;
        return col < c_first ? first + row * c_first + col : second + row * (cols - c_first) + (col - c_first);
    }

    // Four neighbours are in one tensor unless its channels do not divide by four.
    __device__ __forceinline__ void write(size_t row, const Four& four, float4 v) const {
        if (!second || c_first % 4 == 0) return four.write(at(row, four.col), v);
        store(at(row, four.col), v.x);
        if (four.count > 1) store(at(row, four.col + 1), v.y);
        if (four.count > 2) store(at(row, four.col + 2), v.z);
        if (four.count > 3) store(at(row, four.col + 3), v.w);
    }
};
