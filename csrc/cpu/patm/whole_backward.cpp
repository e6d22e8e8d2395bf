// PATM's backward pass from its image, the output's gradient and statistics. Compiled once per instruction set (isa.h).
//
// Each image takes two parts, between which the branch weights' gradient is complete (forward: whole.cpp). The
// first makes the branches again, and with them the gradients of the output projection and of the branch weights. From
// amplitudes and phases, which wait in a cache, the second makes all others. Statistics are constants here: theta is
// linear in the image, so what comes through them is linear in it too, and is added when the batch is done.

#include "cpu/patm/whole.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// Offsets of the sums over pixels. Products add up an image in the arithmetic type, images add up in double.
template <class A>
struct Sums {
  int64_t projections, proj, bias, proj_bias, pre[2], size;  // in both
  int64_t taps[2], total;                                    // in double alone
  explicit Sums(const Places<A>& p) {
    const int64_t c = padded<A>(p.args.c), width = p.b.width;
    projections = 0;                 // (5 width, padded c)
    proj = projections + p.all * c;  // (padded c, width)
    bias = proj + c * width;
    proj_bias = bias + p.all;
    pre[0] = proj_bias + c;
    pre[1] = pre[0] + 2 * width;
    size = pre[1] + 2 * width;
    taps[0] = size;
    taps[1] = taps[0] + 2 * kPhaseTaps * width;
    total = taps[1] + 2 * kPhaseTaps * width;
  }
};

// The branch weights' MLP again, and the gradient of its mean; what its weights' gradients need of each image.
template <class A>
struct MlpGradients {
  const PatmArgs& args;
  Buffer<A> hidden, d_pre, d_logits;  // (n, hidden), (n, hidden), (n, 3 c)
  explicit MlpGradients(const PatmArgs& of)
      : args(of), hidden(of.n * of.hidden), d_pre(of.n * of.hidden), d_logits(of.n * 3 * of.c) {}

  // d_a (3, width) in the outputs' places; d_mean likewise. All bands of an image come here. One of them keeps its
  // results; the others pass memory of their own, of hidden + 3 c.
  void image(const Places<A>& p, const BranchMlp<A>& mlp, int64_t n, const double* d_a, A* d_mean, A* own) const {
    A* const of_pre = own != nullptr ? own : d_pre.data + n * args.hidden;
    A* const of_logits = own != nullptr ? own + args.hidden : d_logits.data + n * 3 * args.c;
    const int64_t width = p.b.width;
    for (int64_t j = 0; j < width; ++j) {
      if (p.output(j) < 0) continue;
      double sum = 0.0;
      for (int i = 0; i < 3; ++i) sum += static_cast<double>(mlp.a.data[i * width + j]) * d_a[i * width + j];
      for (int i = 0; i < 3; ++i)
        of_logits[3 * p.output(j) + i] =
            static_cast<A>(static_cast<double>(mlp.a.data[i * width + j]) * (d_a[i * width + j] - sum));
    }
    const A* const fc1 = static_cast<const A*>(args.fc1);
    const A* const fc2 = static_cast<const A*>(args.fc2);
    for (int64_t k = 0; k < args.hidden; ++k) of_pre[k] = A(0);
    for (int64_t i = 0; i < 3 * args.c; ++i)
      for (int64_t k = 0; k < args.hidden; ++k) of_pre[k] += of_logits[i] * fc2[i * args.hidden + k];
    for (int64_t k = 0; k < args.hidden; ++k) {
      of_pre[k] *= mlp.slope.data[k];
      if (own == nullptr) hidden.data[n * args.hidden + k] = mlp.hidden.data[k];
    }
    for (int64_t j = 0; j < width; ++j) {
      A sum = 0;
      for (int64_t k = 0; k < args.hidden && p.output(j) >= 0; ++k) sum += of_pre[k] * fc1[k * args.c + p.output(j)];
      d_mean[j] = sum;
    }
  }
  // out (rows, columns) and bias (rows) of rows `d` (n, rows) and `values` (n, columns).
  void weight(const A* d, int64_t rows, const A* values, int64_t columns, void* out_, void* bias) const {
    A* const out = static_cast<A*>(out_);
    for (int64_t i = 0; i < rows; ++i) {
      A total = 0;
      for (int64_t j = 0; j < columns; ++j) out[i * columns + j] = A(0);
      for (int64_t n = 0; n < args.n; ++n) {
        total += d[n * rows + i];
        for (int64_t j = 0; j < columns; ++j) out[i * columns + j] += d[n * rows + i] * values[n * columns + j];
      }
      static_cast<A*>(bias)[i] = total;
    }
  }
};

template <class A>
void scatter(const Places<A>& p, const Sums<A>& at, const double* sums, const PatmGradArgs& grads) {
  const int64_t c = p.args.c, stride = padded<A>(c), width = p.b.width;
  void* const weights[] = {grads.z_h, grads.theta_h, grads.z_w, grads.theta_w, grads.z_c};
  void* const biases[] = {grads.z_h_bias, grads.theta_h_bias, grads.z_w_bias, grads.theta_w_bias, grads.z_c_bias};
  for (int64_t j = 0; j < p.all; ++j) {
    const auto& source = p.source(j);
    if (source.channel < 0) continue;
    A* const row = static_cast<A*>(weights[source.which]) + source.channel * c;
    for (int64_t i = 0; i < c; ++i) row[i] = static_cast<A>(sums[at.projections + j * stride + i]);
    if (biases[source.which] != nullptr)
      static_cast<A*>(biases[source.which])[source.channel] = static_cast<A>(sums[at.bias + j]);
  }
  for (int64_t i = 0; i < c; ++i) {
    for (int64_t j = 0; j < width; ++j)
      if (p.output(j) >= 0)
        static_cast<A*>(grads.proj)[i * c + p.output(j)] = static_cast<A>(sums[at.proj + i * width + j]);
    static_cast<A*>(grads.proj_bias)[i] = static_cast<A>(sums[at.proj_bias + i]);
  }
  void *const taps[] = {grads.taps_h, grads.taps_w}, *const scales[] = {grads.scale_h, grads.scale_w};
  void* const shifts[] = {grads.shift_h, grads.shift_w};
  for (int k = 0; k < 2; ++k) {
    gather_taps(p.b, sums + at.taps[k], p.b.count, 0, static_cast<A*>(taps[k]));
    for (int64_t j = 0; j < width; ++j) {
      if (p.paired(j) < 0) continue;
      static_cast<A*>(shifts[k])[p.paired(j)] = static_cast<A>(sums[at.pre[k] + j]);
      static_cast<A*>(scales[k])[p.paired(j)] = static_cast<A>(sums[at.pre[k] + width + j]);
    }
  }
}

template <class T>
void backward(const PatmArgs& args, const PatmGradArgs& grads, int threads) {
  using A = typename Arithmetic<T>::type;
  const int64_t c = args.c, h = args.h, w = args.w, elements = args.n * c * h * w;
  if (elements < kSerialElements) threads = 1;
  if (elements > 0)
    advise<4>(grads.d_image.data, grads.d_image.stride, {args.n, c, h, w},
              static_cast<int64_t>(grads.wide ? sizeof(A) : sizeof(T)));
  const Places<A> places(args);
  const Pairs<A>& b = places.b;
  const int64_t width = b.width, branch = places.branch, stride = padded<A>(c);
  const BranchWeights<A> weights(places);
  const Image<A> image(args);
  // Weights for the products with their transposes.
  const Buffer<A> projections(places.all * stride), proj(c * width);
  pack(places.all, c, projections.data, [&](int64_t k, int64_t j) {
    const A* const row = places.source(k).weight;
    return row == nullptr ? A(0) : row[j];
  });
  pack(c, width, proj.data, [&](int64_t k, int64_t j) {
    return places.output(j) < 0 ? A(0) : static_cast<const A*>(args.proj)[k * c + places.output(j)];
  });
  const ZeroBuffer<A> zero(width > stride ? width : stride), center_w(width), center_h(width);
  Channels<A> channels[2];
  for (int k = 0; k < 2; ++k) {
    const ZeroBuffer<A>& center = k == 0 ? center_w : center_h;
    for (int64_t j = 0; j < width; ++j)
      if (places.paired(j) >= 0 && grads.center != nullptr)
        center.data[j] = static_cast<const A*>(grads.center)[k * c + places.paired(j)];
    channels[k] = {weights.scale[k].data, weights.shift[k].data, center.data};
  }
  const Sums<A> at(places);
  const MlpGradients<A> of_mlp(args);
  const ZeroBuffer<double> totals(threads * at.total);
  // For the images in work: gradients of the mixed branches by image, amplitudes and phases by unit, whose rows along H
  // begin and end beside its band.
  const int64_t units = Share::most_units(threads), of_image = h * w * width, beside = 2 * (kReach * w + kGemmRows);
  const int64_t images = smaller(args.n, threads);
  const Buffer<A> d_mixed_of(of_image * images), z_theta_of((2 * images * (h + threads) * w + units * beside) * branch);
  const Buffer<double> d_a_of(3 * width * units);
  WAVEMIX_PARALLEL(threads) {
    const int64_t most = image.step_pixels();
    const Block<A> x(most, c), grad(most, c), mixed(most, width), d(most, places.all), d_x(most, c);
    const Ring<A> waves_h(image.rows_per_step, w * branch), d_h(image.rows_per_step, w * width);
    const ZeroBuffer<A> line((w + 2 * kReach) * branch), d_line((w + 2 * kReach) * width);
    const Buffer<A> kept(2 * w * width), along_w(w * width), along_h(w * width), row_sums(3 * width), d_mean(width);
    const Buffer<A> part(at.size), own(args.hidden + 3 * c);
    const Buffer<double> image_d_a(3 * width);
    const BranchMlp<A> mlp(places);
    double* const mine = totals.data + WAVEMIX_THREAD * at.total;
    A* const waves = line.data + kReach * branch;
    for (int64_t first = 0; first < args.n; first += threads) {
      const Share share(first, args.n, h, threads);
      const int64_t of_unit = (2 * ((h + share.bands - 1) / share.bands) * w + beside) * branch;
      const auto begin = [&](const Band& band) {
        part.clear(at.size);
        load_row(static_cast<const A*>(grads.branch_mean) + band.image * c, 1, c, mlp.mean.data);
        mlp.run(places);
      };
      const A *const a0 = mlp.a.data, *const a1 = a0 + width, *const a2 = a1 + width;
      WAVEMIX_FOR
      for (int64_t unit = 0; unit < share.units(); ++unit) {
        const Band band(share, unit, h);
        begin(band);
        A* const d_mixed = d_mixed_of.data + band.slot * of_image;
        A* const z_theta_w = z_theta_of.data + unit * of_unit;
        double* const d_a = d_a_of.data + unit * 3 * width;
        std::memset(d_a, 0, static_cast<size_t>(3 * width) * sizeof(double));
        const int64_t start = band.y0 - kReach > 0 ? band.y0 - kReach : 0;
        A* const z_theta_h = z_theta_w + ((band.y1 - band.y0) * w + kGemmRows) * branch;
        const A path = args.path == nullptr ? A(1) : static_cast<const A*>(args.path)[band.image];
        int64_t made = start;
        for (int64_t y0 = band.y0; y0 < band.y1; y0 += image.rows_per_step) {
          const int64_t y1 = smaller(y0 + image.rows_per_step, band.y1), pixels = (y1 - y0) * w;
          const int64_t whole = round_up(pixels, kGemmRows);
          while (made < smaller(y1 + kReach, h)) {
            const int64_t next = smaller(made + image.rows_per_step, smaller(y1 + kReach, h));
            image.template load<T>(band.image, made, next, x);
            A* const rows = z_theta_h + (made - start) * w * branch;
            product(round_up((next - made) * w, kGemmRows), branch, c, x.data, x.stride, weights.packed[1].data,
                    weights.bias.data + branch, rows, branch);
            for (int64_t y = made; y < next; ++y)
              line_of_waves(b, rows + (y - made) * w * branch, weights.scale[1].data, weights.shift[1].data, w,
                            waves_h.row(y), kept.data);
            made = next;
          }
          image.template load<T>(band.image, y0, y1, x);
          A* const rows = z_theta_w + (y0 - band.y0) * w * branch;
          product(whole, branch, c, x.data, x.stride, weights.packed[0].data, weights.bias.data, rows, branch);
          product(whole, width, c, x.data, x.stride, weights.packed[2].data, weights.bias.data + 2 * branch, mixed.data,
                  width);
          A* to = grad.data;
          for (int64_t y = y0; y < y1; ++y)
            for (int64_t i = 0; i < w; ++i, to += grad.stride) {
              load_row(Image<A>::template pixel<const T>(grads.grad, band.image, y, i), 1, c, to);
              for (int64_t k = 0; k < c; ++k) to[k] *= path;
            }
          product(whole, width, c, grad.data, grad.stride, proj.data, zero.data, d.data, width);
          std::memcpy(d_mixed + y0 * w * width, d.data, static_cast<size_t>(pixels * width) * sizeof(A));
          for (int64_t y = y0; y < y1; ++y) {
            const A* from[kPhaseTaps];
            line_of_waves(b, rows + (y - y0) * w * branch, weights.scale[0].data, weights.shift[0].data, w, waves,
                          kept.data);
            for (int64_t t = 0; t < kPhaseTaps; ++t) from[t] = line.data + t * branch;
            convolve(b, from, weights.taps[0].data, w, along_w.data, row_sums.data);
            for (int64_t t = 0; t < kPhaseTaps; ++t) from[t] = waves_h.row_or_zeros(y + t - kReach, h);
            convolve(b, from, weights.taps[1].data, w, along_h.data, row_sums.data);
            row_sums.clear(3 * width);
            for (int64_t i = 0; i < w; ++i) {
              const A* const __restrict u = along_w.data + i * width;
              const A* const __restrict v = along_h.data + i * width;
              const A* const __restrict g = d.data + ((y - y0) * w + i) * width;
              A* const __restrict m = mixed.data + ((y - y0) * w + i) * width;
              A* const __restrict sums = row_sums.data;
              WAVEMIX_SIMD
              for (int64_t j = 0; j < width; ++j) {
                sums[j] += g[j] * u[j];
                sums[width + j] += g[j] * v[j];
                sums[2 * width + j] += g[j] * m[j];
                m[j] = u[j] * a0[j] + v[j] * a1[j] + m[j] * a2[j];
              }
            }
            add_to(d_a, row_sums.data, 3 * width);
          }
          add_product_of_transpose(stride, width, pixels, grad.data, grad.stride, mixed.data, width,
                                   part.data + at.proj, width);
          add_rows(grad, pixels, part.data + at.proj_bias);
        }
        add_to(mine, part.data, at.size);
      }
      WAVEMIX_FOR
      for (int64_t unit = 0; unit < share.units(); ++unit) {
        const Band band(share, unit, h);
        begin(band);
        double* const d_a = d_a_of.data + band.slot * share.bands * 3 * width;
        image_d_a.clear(3 * width);
        for (int64_t k = 0; k < share.bands; ++k)
          for (int64_t j = 0; j < 3 * width; ++j) image_d_a.data[j] += d_a[k * 3 * width + j];
        of_mlp.image(places, mlp, band.image, image_d_a.data, d_mean.data, band.y0 == 0 ? nullptr : own.data);
        for (int64_t j = 0; j < width; ++j) d_mean.data[j] /= static_cast<A>(h * w);
        const A* const d_mixed = d_mixed_of.data + band.slot * of_image;
        const A* const z_theta_w = z_theta_of.data + unit * of_unit;
        const int64_t start = band.y0 - kReach > 0 ? band.y0 - kReach : 0;
        const A* const z_theta_h = z_theta_w + ((band.y1 - band.y0) * w + kGemmRows) * branch;
        // The gradient of one row of a branch.
        const auto row_gradient = [&](const A* __restrict a, int64_t y, A* to, int64_t step) {
          for (int64_t i = 0; i < w; ++i) {
            const A* const __restrict g = d_mixed + (y * w + i) * width;
            const A* const __restrict add = d_mean.data;
            A* const __restrict row = to + i * step;
            WAVEMIX_SIMD
            for (int64_t j = 0; j < width; ++j) row[j] = g[j] * a[j] + add[j];
          }
        };
        int64_t made = start;
        for (int64_t y0 = band.y0; y0 < band.y1; y0 += image.rows_per_step) {
          const int64_t y1 = smaller(y0 + image.rows_per_step, band.y1), pixels = (y1 - y0) * w;
          for (; made < smaller(y1 + kReach, h); ++made) row_gradient(a1, made, d_h.row(made), width);
          for (int64_t y = y0; y < y1; ++y) {
            A* const row = d.data + (y - y0) * w * places.all;
            for (int k = 0; k < 2; ++k) {
              const A* const z_theta =
                  (k == 0 ? z_theta_w + (y - band.y0) * w * branch : z_theta_h + (y - start) * w * branch);
              const A* from[kPhaseTaps];
              if (k == 0) row_gradient(a0, y, d_line.data + kReach * width, width);
              for (int64_t t = 0; t < kPhaseTaps; ++t)
                from[t] = k == 0 ? d_line.data + (2 * kReach - t) * width : d_h.row_or_zeros(y + kReach - t, h);
              line_of_waves(b, z_theta, weights.scale[k].data, weights.shift[k].data, w, waves, kept.data);
              taps_gradient(b, from, waves, w, mine + at.taps[k]);
              convolve_transposed(b, from, weights.taps[k].data, w, row + k * branch, places.all);
              A* const sums = part.data + at.pre[k];
              for (int64_t i = 0; i < w; ++i)
                for (int64_t p = 0; p < 2; ++p) {
                  const int64_t of = p * b.half;
                  const A* const z = z_theta + i * branch + p * width;
                  const A* const cosine = kept.data + 2 * i * width + of;
                  A* const d_wave = row + i * places.all + k * branch + p * width;
                  wave_gradient<A>(b.half, {channels[k].scale + of, channels[k].shift + of, channels[k].center + of}, z,
                                   z + b.half, cosine, cosine + width, d_wave, d_wave + b.half, sums + of,
                                   sums + width + of);
                }
            }
            row_gradient(a2, y, row + 2 * branch, places.all);
          }
          image.template load<T>(band.image, y0, y1, x);
          add_product_of_transpose(places.all, c, pixels, d.data, d.stride, x.data, x.stride,
                                   part.data + at.projections, stride);
          add_rows(d, pixels, part.data + at.bias);
          product(round_up(pixels, kGemmRows), c, places.all, d.data, d.stride, projections.data, zero.data, d_x.data,
                  d_x.stride);
          const A* from = d_x.data;
          for (int64_t y = y0; y < y1; ++y)
            for (int64_t i = 0; i < w; ++i, from += d_x.stride)
              if (grads.wide) {
                store_row(from, Image<A>::template pixel<A>(grads.d_image, band.image, y, i), 1, c);
              } else {
                store_row(from, Image<A>::template pixel<T>(grads.d_image, band.image, y, i), 1, c);
              }
        }
        add_to(mine, part.data, at.size);
      }
    }
  }
  for (int t = 1; t < threads; ++t)
    for (int64_t i = 0; i < at.total; ++i) totals.data[i] += totals.data[t * at.total + i];
  scatter(places, at, totals.data, grads);
  const A* const mean = static_cast<const A*>(grads.branch_mean);
  of_mlp.weight(of_mlp.d_pre.data, args.hidden, mean, c, grads.fc1, grads.fc1_bias);
  of_mlp.weight(of_mlp.d_logits.data, 3 * c, of_mlp.hidden.data, args.hidden, grads.fc2, grads.fc2_bias);
}

}  // namespace

void patm_backward(const PatmArgs& args, const PatmGradArgs& grads, int threads) {
  dispatch(args.dtype, [&](auto element) { backward<decltype(element)>(args, grads, threads); });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
