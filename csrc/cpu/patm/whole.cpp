// PATM from its image to its output. Compiled once per instruction set (see isa.h).
//
// A thread takes an image (or a band of its rows) through everything. Intermediate results are as large as the image
// and stay in a cache; a pixel finds its neighbours in a ring of the last rows. The branch weights depend on all of the
// image, so the two convolved branches wait for them.
//
// Memory is read twice and written once. z_c alone is made where it is mixed. Batch statistics follow from the image's
// moments, so no product is made twice.

#include "cpu/patm/whole.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

template <class T>
void advise_image(const Plane& out, const PatmArgs& args) {
  if (args.n * args.c * args.h * args.w > 0)
    advise<4>(out.data, out.stride, {args.n, args.c, args.h, args.w}, static_cast<int64_t>(sizeof(T)));
}

// --- Moments -----------------------------------------------------------------------------------------------

// Differences from one pixel, in double: floats multiply exactly there, and what is near to all values cancels first.
template <class T>
void moments(const PatmArgs& args, double* mean, double* covariance, int threads) {
  using A = typename Arithmetic<T>::type;
  const int64_t c = args.c, stride = padded<double>(c), size = (stride + 1) * stride;
  const double count = static_cast<double>(args.n * args.h * args.w);
  if (args.n * args.h * args.w * c < kSerialElements) threads = 1;
  const Image<A> image(args);
  const int64_t steps = (args.h + image.rows_per_step - 1) / image.rows_per_step;
  const Block<A> origin(1, c);
  if (count > 0) {
    PatmArgs one = args;
    one.w = 1;
    Image<A>(one).template load<T>(0, 0, 1, origin);
  }
  const Scratch memory(threads * size * static_cast<int64_t>(sizeof(double)));
  double* const sums = reinterpret_cast<double*>(memory.block);
  std::memset(sums, 0, static_cast<size_t>(threads * size) * sizeof(double));
  WAVEMIX_PARALLEL(threads) {
    const Block<A> rows(image.step_pixels(), c);
    const Block<double> values(image.step_pixels(), c);
    double* const mine = sums + WAVEMIX_THREAD * size;
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < args.n * steps; ++unit) {
      const int64_t y0 = unit % steps * image.rows_per_step, y1 = smaller(y0 + image.rows_per_step, args.h);
      const int64_t pixels = (y1 - y0) * args.w;
      image.template load<T>(unit / steps, y0, y1, rows);
      for (int64_t i = 0; i < pixels; ++i) {
        const A* const __restrict from = rows.data + i * rows.stride;
        double* const __restrict to = values.data + i * values.stride;
        WAVEMIX_SIMD
        for (int64_t j = 0; j < c; ++j) to[j] = static_cast<double>(from[j]) - static_cast<double>(origin.data[j]);
      }
      add_rows(values, pixels, mine + stride * stride);
      // The upper triangle is enough: of each panel of columns the rows above its end.
      const Panels panels(stride / kLanes<double>);
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t at = panels.begin(p) * kLanes<double>, end = panels.begin(p + 1) * kLanes<double>;
        gemm_panel<double, true>(panels.begin(p + 1) - panels.begin(p), smaller(round_up(end, kGemmRows), stride),
                                 values.data, values.stride, values.data + at, values.stride, pixels, nullptr,
                                 mine + at, stride);
      }
    }
  }
  for (int t = 1; t < threads; ++t)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[t * size + i];
  const double* const shifted = sums + stride * stride;
  for (int64_t i = 0; i < c; ++i) {
    mean[i] = static_cast<double>(origin.data[i]) + shifted[i] / count;
    for (int64_t j = i; j < c; ++j)
      covariance[i * c + j] = covariance[j * c + i] =
          (sums[i * stride + j] - shifted[i] * (shifted[j] / count)) / count;
  }
}

// --- Forward -----------------------------------------------------------------------------------------------

template <class T>
void forward(const PatmArgs& args, const Plane& out, void* branch_mean_, int threads) {
  using A = typename Arithmetic<T>::type;
  A* const branch_mean = static_cast<A*>(branch_mean_);
  const int64_t c = args.c, h = args.h, w = args.w, elements = args.n * c * h * w;
  if (elements == 0) return;
  if (elements < kSerialElements) threads = 1;
  advise_image<T>(out, args);
  const Places<A> places(args);
  const Pairs<A>& b = places.b;
  const int64_t width = b.width;
  const BranchWeights<A> weights(places);
  const Image<A> image(args);
  const Buffer<A> proj(width * padded<A>(c));
  pack(width, c, proj.data, [&](int64_t k, int64_t j) {
    return places.output(k) < 0 ? A(0) : static_cast<const A*>(args.proj)[j * c + places.output(k)];
  });
  const ZeroBuffer<A> proj_bias(padded<A>(c));
  if (args.proj_bias != nullptr) load_row(static_cast<const A*>(args.proj_bias), 1, c, proj_bias.data);
  // Both convolved branches of the images in work; for each unit the sums of these and of the image.
  const int64_t of_image = h * w * width, per_unit = width + padded<A>(c);
  const Buffer<A> convolved(2 * of_image * smaller(args.n, threads));
  const Buffer<double> sums(per_unit * Share::most_units(threads));
  WAVEMIX_PARALLEL(threads) {
    const int64_t most = image.step_pixels();
    const Block<A> x(most, c), third(most, width), mixed(most, c);
    const Block<A> z_theta(most, places.branch);
    const Ring<A> ring_of(image.rows_per_step, w * places.branch);
    const ZeroBuffer<A> line((w + 2 * kReach) * places.branch);
    const Buffer<A> kept(2 * w * width), row_sums(width);
    const ZeroBuffer<A> x_sums(padded<A>(c));
    const BranchMlp<A> mlp(places);
    for (int64_t first = 0; first < args.n; first += threads) {
      const Share share(first, args.n, h, threads);
      WAVEMIX_FOR
      for (int64_t unit = 0; unit < share.units(); ++unit) {
        const Band band(share, unit, h);
        A* const along_w = convolved.data + 2 * band.slot * of_image;
        A* const along_h = along_w + of_image;
        double* const unit_sums = sums.data + unit * per_unit;
        std::memset(unit_sums, 0, static_cast<size_t>(per_unit) * sizeof(double));
        int64_t made = band.y0 - kReach > 0 ? band.y0 - kReach : 0;
        for (int64_t y0 = band.y0; y0 < band.y1; y0 += image.rows_per_step) {
          const int64_t y1 = smaller(y0 + image.rows_per_step, band.y1);
          while (made < smaller(y1 + kReach, h)) {
            const int64_t next = smaller(made + image.rows_per_step, smaller(y1 + kReach, h));
            image.template load<T>(band.image, made, next, x);
            product(round_up((next - made) * w, kGemmRows), places.branch, c, x.data, x.stride, weights.packed[1].data,
                    weights.bias.data + places.branch, z_theta.data, z_theta.stride);
            for (int64_t y = made; y < next; ++y)
              line_of_waves(b, z_theta.data + (y - made) * w * places.branch, weights.scale[1].data,
                            weights.shift[1].data, w, ring_of.row(y), kept.data);
            made = next;
          }
          image.template load<T>(band.image, y0, y1, x);
          const int64_t pixels = (y1 - y0) * w;
          product(round_up(pixels, kGemmRows), places.branch, c, x.data, x.stride, weights.packed[0].data,
                  weights.bias.data, z_theta.data, z_theta.stride);
          x_sums.clear(padded<A>(c));
          add_rows(x, pixels, x_sums.data);
          add_to(unit_sums + width, x_sums.data, c);
          for (int64_t y = y0; y < y1; ++y) {
            const A* at[kPhaseTaps];
            line_of_waves(b, z_theta.data + (y - y0) * w * places.branch, weights.scale[0].data, weights.shift[0].data,
                          w, line.data + kReach * places.branch, kept.data);
            for (int64_t t = 0; t < kPhaseTaps; ++t) at[t] = line.data + t * places.branch;
            convolve(b, at, weights.taps[0].data, w, along_w + y * w * width, row_sums.data);
            add_to(unit_sums, row_sums.data, width);
            for (int64_t t = 0; t < kPhaseTaps; ++t) at[t] = ring_of.row_or_zeros(y + t - kReach, h);
            convolve(b, at, weights.taps[1].data, w, along_h + y * w * width, row_sums.data);
            add_to(unit_sums, row_sums.data, width);
          }
        }
      }
      WAVEMIX_FOR
      for (int64_t unit = 0; unit < share.units(); ++unit) {
        const Band band(share, unit, h);
        const A* const along_w = convolved.data + 2 * band.slot * of_image;
        const A* const along_h = along_w + of_image;
        double* const image_sums = sums.data + band.slot * share.bands * per_unit;
        for (int64_t j = 0; j < width; ++j) {
          const int64_t channel = places.output(j);
          if (channel < 0) continue;
          const A* const row = static_cast<const A*>(args.z_c) + channel * c;
          double sum = 0.0;
          for (int64_t part = 0; part < share.bands; ++part) {
            const double* const of = image_sums + part * per_unit;
            sum += of[j];
            // The third branch is linear: its sum is that of the image.
            for (int64_t i = 0; i < c; ++i) sum += static_cast<double>(row[i]) * of[width + i];
          }
          sum /= static_cast<double>(h * w);
          if (args.z_c_bias != nullptr) sum += static_cast<double>(static_cast<const A*>(args.z_c_bias)[channel]);
          mlp.mean.data[channel] = static_cast<A>(sum);
        }
        if (band.y0 == 0) std::memcpy(branch_mean + band.image * c, mlp.mean.data, static_cast<size_t>(c) * sizeof(A));
        mlp.run(places);
        const A path = args.path == nullptr ? A(1) : static_cast<const A*>(args.path)[band.image];
        const A *const a0 = mlp.a.data, *const a1 = a0 + width, *const a2 = a1 + width;
        for (int64_t y0 = band.y0; y0 < band.y1; y0 += image.rows_per_step) {
          const int64_t y1 = smaller(y0 + image.rows_per_step, band.y1), pixels = (y1 - y0) * w;
          image.template load<T>(band.image, y0, y1, x);
          product(round_up(pixels, kGemmRows), width, c, x.data, x.stride, weights.packed[2].data,
                  weights.bias.data + 2 * places.branch, third.data, width);
          for (int64_t i = 0; i < pixels; ++i) {
            const A* const __restrict u = along_w + (y0 * w + i) * width;
            const A* const __restrict v = along_h + (y0 * w + i) * width;
            A* const __restrict m = third.data + i * width;
            WAVEMIX_SIMD
            for (int64_t j = 0; j < width; ++j) m[j] = u[j] * a0[j] + v[j] * a1[j] + m[j] * a2[j];
          }
          product(round_up(pixels, kGemmRows), c, width, third.data, width, proj.data, proj_bias.data, mixed.data,
                  mixed.stride);
          const A* row = mixed.data;
          for (int64_t y = y0; y < y1; ++y)
            for (int64_t i = 0; i < w; ++i, row += mixed.stride) {
              const A* result = row;
              if (args.residual) {
                load_row(Image<A>::template pixel<const T>(args.x, band.image, y, i), 1, c, x.data);
                A* const __restrict sum = x.data;
                WAVEMIX_SIMD
                for (int64_t k = 0; k < c; ++k) sum[k] += path * row[k];
                result = sum;
              }
              store_row(result, Image<A>::template pixel<T>(out, band.image, y, i), 1, c);
            }
        }
      }
    }
  }
}

// --- The gradient through statistics ---------------------------------------------------------------------------

template <class T>
void add_linear(const PatmArgs& args, const Plane& partial, const void* matrix_, const void* vector, const Plane& out,
                int threads) {
  using A = typename Arithmetic<T>::type;
  const int64_t c = args.c;
  if (args.n * c * args.h * args.w == 0) return;
  if (args.n * c * args.h * args.w < kSerialElements) threads = 1;
  if (out.data != partial.data) advise_image<T>(out, args);
  const A* const matrix = static_cast<const A*>(matrix_);
  const Image<A> image(args);
  const Buffer<A> packed(c * padded<A>(c));
  pack(c, c, packed.data, [=](int64_t k, int64_t j) { return matrix[j * c + k]; });
  const ZeroBuffer<A> constant(padded<A>(c));
  load_row(static_cast<const A*>(vector), 1, c, constant.data);
  const int64_t steps = (args.h + image.rows_per_step - 1) / image.rows_per_step;
  WAVEMIX_PARALLEL(threads) {
    const Block<A> x(image.step_pixels(), c), linear(image.step_pixels(), c);
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < args.n * steps; ++unit) {
      const int64_t n = unit / steps, y0 = unit % steps * image.rows_per_step;
      const int64_t y1 = smaller(y0 + image.rows_per_step, args.h);
      image.template load<T>(n, y0, y1, x);
      product(round_up((y1 - y0) * args.w, kGemmRows), c, c, x.data, x.stride, packed.data, constant.data, linear.data,
              linear.stride);
      A* row = linear.data;
      for (int64_t y = y0; y < y1; ++y)
        for (int64_t i = 0; i < args.w; ++i, row += linear.stride) {
          const A* const from = Image<A>::template pixel<const A>(partial, n, y, i);
          for (int64_t k = 0; k < c; ++k) row[k] += from[k];
          store_row(row, Image<A>::template pixel<T>(out, n, y, i), 1, c);
        }
    }
  }
}

}  // namespace

void patm_moments(const PatmArgs& args, double* mean, double* covariance, int threads) {
  dispatch(args.dtype, [&](auto element) { moments<decltype(element)>(args, mean, covariance, threads); });
}
void patm_forward(const PatmArgs& args, const Plane& out, void* branch_mean, int threads) {
  dispatch(args.dtype, [&](auto element) { forward<decltype(element)>(args, out, branch_mean, threads); });
}
void patm_add_linear(const PatmArgs& args, const Plane& partial, const void* matrix, const void* vector,
                     const Plane& out, int threads) {
  dispatch(args.dtype,
           [&](auto element) { add_linear<decltype(element)>(args, partial, matrix, vector, out, threads); });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
