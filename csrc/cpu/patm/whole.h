// Shared by forward and backward of the whole PATM: the order of channels, packed weights, images in, waves, the branch
// weights' MLP. Included by the per-ISA units only.
//
// Columns of products come out in the order in which waves want them. A branch's row of one pixel has 2 `width` places,
// [z | theta] of the first channels of all pairs, then of the second ones, each part padded with zeros to `half`; its
// waves [z cos | z sin] and their gradients take the same places. Outputs are in `width` places, [first c/2 | others].
#pragma once

#include <math.h>

#include "cpu/common/gelu.h"
#include "cpu/common/operands.h"
#include "cpu/patm/waves.h"
#include "wavemix/patm_whole.h"

namespace wavemix {
namespace WAVEMIX_ISA {

// Pixels that go through a product together: some whole rows of an image. Their operands, and the waves of seven rows
// more, stay in the L2 cache (0.6 MB at 64 channels, 56 columns).
constexpr int64_t kStepPixels = 64;

// All places of one pixel: branch h (along W), branch w (along H), z_c.
template <class A>
struct Places {
  struct Source {
    const A *weight, *bias;  // a row of c; null in the padding, bias also where there is none
    int64_t which, channel;  // 0, 1: z_h, theta_h; 2, 3: z_w, theta_w; 4: z_c
  };
  const PatmArgs& args;
  Pairs<A> b;
  int64_t branch, all;  // 2 width, 5 width
  Buffer<int64_t> outputs, paireds;
  Buffer<Source> sources;

  explicit Places(const PatmArgs& of)
      : args(of), b(of.c / 2), branch(2 * b.width), all(5 * b.width), outputs(b.width), paireds(b.width), sources(all) {
    for (int64_t place = 0; place < b.width; ++place) {
      const int64_t g = place % b.half, part = place / b.half;
      outputs.data[place] = g < b.count ? part * b.count + g : -1;
      paireds.data[place] = g < b.count ? 2 * g + part : -1;
    }
    for (int64_t place = 0; place < all; ++place) {
      const int64_t i = place / branch, at = place % branch;
      sources.data[place] = i == 2 ? row(4, output(at)) : row(2 * i + at / b.half % 2, channel_of(at));
    }
  }
  // The channel at a place of the outputs, and of one quantity of a branch ([half | half]); -1 in the padding.
  int64_t output(int64_t place) const { return outputs.data[place]; }
  int64_t paired(int64_t place) const { return paireds.data[place]; }
  const Source& source(int64_t place) const { return sources.data[place]; }

 private:
  int64_t channel_of(int64_t at) const { return paired(at / b.width * b.half + at % b.half); }
  Source row(int64_t which, int64_t channel) const {
    if (channel < 0) return {nullptr, nullptr, which, channel};
    const void* const weights[] = {args.z_h, args.theta_h, args.z_w, args.theta_w, args.z_c};
    const void* const biases[] = {args.z_h_bias, args.theta_h_bias, args.z_w_bias, args.theta_w_bias, args.z_c_bias};
    const A* const bias = static_cast<const A*>(biases[which]);
    return {static_cast<const A*>(weights[which]) + channel * args.c, bias == nullptr ? nullptr : bias + channel, which,
            channel};
  }
};

template <class A>
struct Image {  // x, as the kernel takes it
  const PatmArgs& args;
  int64_t rows_per_step;
  explicit Image(const PatmArgs& of) : args(of) {
    rows_per_step = of.w > 0 && of.w < kStepPixels ? kStepPixels / of.w : 1;
    if (of.h > 0) rows_per_step = smaller(rows_per_step, of.h);
  }
  int64_t step_pixels() const { return round_up(rows_per_step * args.w, kGemmRows); }

  template <class T>
  static T* pixel(const Plane& plane, int64_t image, int64_t y, int64_t x) {
    return static_cast<T*>(plane.data) + image * plane.stride[0] + y * plane.stride[2] + x * plane.stride[3];
  }
  template <class T>
  void load(int64_t image, int64_t y0, int64_t y1, const Block<A>& to) const {
    const int64_t first = args.by_image ? image * args.c : 0;
    const A* const scale = static_cast<const A*>(args.scale);
    const A* const shift = static_cast<const A*>(args.shift);
    A* row = to.data;
    for (int64_t y = y0; y < y1; ++y)
      for (int64_t x = 0; x < args.w; ++x, row += to.stride) {
        load_row(pixel<const T>(args.x, image, y, x), 1, args.c, row);
        if (scale == nullptr) continue;
        const A *const s = scale + first, *const t = shift + first;
        A* const __restrict to_row = row;
        WAVEMIX_SIMD
        for (int64_t i = 0; i < args.c; ++i) to_row[i] = to_row[i] * s[i] + t[i];
      }
  }
};

// Packed for the products that make all branches from the image, and the constants of their waves.
template <class A>
struct BranchWeights {
  Buffer<A> packed[3];
  ZeroBuffer<A> bias, scale[2], shift[2];
  Buffer<A> taps[2];
  explicit BranchWeights(const Places<A>& p)
      : packed{Buffer<A>(p.args.c * p.branch), Buffer<A>(p.args.c * p.branch), Buffer<A>(p.args.c * p.b.width)},
        bias(p.all),
        scale{ZeroBuffer<A>(p.b.width), ZeroBuffer<A>(p.b.width)},
        shift{ZeroBuffer<A>(p.b.width), ZeroBuffer<A>(p.b.width)},
        taps{Buffer<A>(2 * kPhaseTaps * p.b.width), Buffer<A>(2 * kPhaseTaps * p.b.width)} {
    for (int i = 0; i < 3; ++i)
      pack(p.args.c, i < 2 ? p.branch : p.b.width, packed[i].data, [&](int64_t k, int64_t j) {
        const A* const weight = p.source(i * p.branch + j).weight;
        return weight == nullptr ? A(0) : weight[k];
      });
    for (int64_t j = 0; j < p.all; ++j) {
      const auto& source = p.source(j);
      if (source.bias != nullptr) bias.data[j] = *source.bias;
    }
    const void *const scales[] = {p.args.scale_h, p.args.scale_w}, *const shifts[] = {p.args.shift_h, p.args.shift_w};
    const void* const all_taps[] = {p.args.taps_h, p.args.taps_w};
    for (int i = 0; i < 2; ++i) {
      for (int64_t j = 0; j < p.b.width; ++j) {
        if (p.paired(j) < 0) continue;
        scale[i].data[j] = static_cast<const A*>(scales[i])[p.paired(j)];
        shift[i].data[j] = static_cast<const A*>(shifts[i])[p.paired(j)];
      }
      lay_out_taps(p.b, static_cast<const A*>(all_taps[i]), p.b.count, 0, taps[i].data);
    }
  }
};

// Waves of one line, `kept` cosines and sines of each pixel, [cos of `width` | sin].
template <class A>
static void line_of_waves(const Pairs<A>& b, const A* z_theta, const A* scale, const A* shift, int64_t count, A* waves,
                          A* kept) {
  for (int64_t j = 0; j < count; ++j)
    for (int64_t k = 0; k < 2; ++k) {
      const A* const __restrict z = z_theta + (2 * j + k) * b.width;
      A* const __restrict wave = waves + (2 * j + k) * b.width;
      A* const __restrict cosine = kept + 2 * j * b.width + k * b.half;
      A* const __restrict sine = cosine + b.width;
      waves_of(z + b.half, scale + k * b.half, shift + k * b.half, b.half, cosine, sine);
      WAVEMIX_SIMD
      for (int64_t g = 0; g < b.half; ++g) {
        wave[g] = z[g] * cosine[g];
        wave[b.half + g] = z[g] * sine[g];
      }
    }
}

// Rows of an image that are made in order and used by those near them; outside of the image there are zeros.
template <class A>
struct Ring {
  int64_t slots, size, made = 0;
  Buffer<A> rows;
  ZeroBuffer<A> outside;
  Ring(int64_t step, int64_t row) : slots(step + 2 * kReach), size(row), rows(slots * row), outside(row) {}
  A* row(int64_t y) const { return rows.data + y % slots * size; }
  const A* row_or_zeros(int64_t y, int64_t height) const { return y < 0 || y >= height ? outside.data : row(y); }
};

// How images are shared out: one to a thread, or bands of rows where there are fewer images than threads.
struct Share {
  int64_t first, images, bands;
  Share(int64_t begin, int64_t n, int64_t height, int threads) : first(begin), images(smaller(n - begin, threads)) {
    bands = smaller((threads + images - 1) / images, (height + kReach) / (kReach + 1));
  }
  int64_t units() const { return images * bands; }
  static int64_t most_units(int threads) { return 2 * threads; }
};
struct Band {
  int64_t slot, image, y0, y1;
  Band(const Share& share, int64_t unit, int64_t height) {
    slot = unit / share.bands;
    image = share.first + slot;
    y0 = height * (unit % share.bands) / share.bands;
    y1 = height * (unit % share.bands + 1) / share.bands;
  }
};

// mean -> pre -> GELU -> hidden -> softmax over 3 -> a.
template <class A>
struct BranchMlp {
  const PatmArgs& args;
  Buffer<A> mean, hidden, slope, a;  // a (3, width), in the outputs' places
  explicit BranchMlp(const Places<A>& p)
      : args(p.args), mean(p.args.c), hidden(p.args.hidden), slope(p.args.hidden), a(3 * p.b.width) {}

  static A dot(const A* __restrict u, const A* __restrict v, int64_t n) {
    A sum = 0;
    WAVEMIX_SIMD_SUM(sum)
    for (int64_t i = 0; i < n; ++i) sum += u[i] * v[i];
    return sum;
  }
  static float exponential(float x) { return ::expf(x); }
  static double exponential(double x) { return ::exp(x); }

  void run(const Places<A>& p) const {
    for (int64_t k = 0; k < args.hidden; ++k)
      hidden.data[k] = gelu(dot(static_cast<const A*>(args.fc1) + k * args.c, mean.data, args.c) +
                                static_cast<const A*>(args.fc1_bias)[k],
                            slope.data[k]);
    for (int64_t j = 0; j < p.b.width; ++j) {
      const int64_t channel = p.output(j);
      A weight[3] = {0, 0, 0};
      if (channel >= 0) {
        A logit[3], sum = 0;
        for (int64_t i = 0; i < 3; ++i)
          logit[i] = dot(static_cast<const A*>(args.fc2) + (3 * channel + i) * args.hidden, hidden.data, args.hidden) +
                     static_cast<const A*>(args.fc2_bias)[3 * channel + i];
        A most = logit[0];
        for (int i = 1; i < 3; ++i) most = logit[i] > most ? logit[i] : most;
        for (int i = 0; i < 3; ++i) sum += weight[i] = exponential(logit[i] - most);
        for (int i = 0; i < 3; ++i) weight[i] /= sum;
      }
      for (int i = 0; i < 3; ++i) a.data[i * p.b.width + j] = weight[i];
    }
  }
};

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
