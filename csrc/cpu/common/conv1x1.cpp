// Weight gradients of 1x1 convolutions on the CPU. Compiled once per instruction set (see isa.h).
//
// Libraries are slow here: a convolution is cut by pixels, and these are few; a matrix product first transposes both
// operands in memory. Here a product of the transpose reads both as they lie.
// Threads share the rows of the result.

#include "cpu/common/operands.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

// Pixels at a time: a panel of the image and a strip of the gradient stay in L2, and float sums are chains no longer
// than this. Output channels at a time: the strip's and the result's.
constexpr int64_t kDepth = 512, kStrip = 64;

template <class T>
void backward_weight(const Conv1x1GradArgs& args, int threads) {
  using A = typename Arithmetic<T>::type;
  if (args.rows * args.o < kSerialElements) threads = 1;
  const int64_t strips = (args.o + kStrip - 1) / kStrip, width = padded<A>(args.c);
  const Panels panels(width / kLanes<A>);
  // The image, block after block of pixels, panel after panel: what every strip reads from end to end.
  const Buffer<A> packed(args.rows * width);
  const int64_t blocks = (args.rows + kDepth - 1) / kDepth;
  WAVEMIX_PARALLEL(threads) {
    const Block<A> row(1, args.c);
    WAVEMIX_FOR
    for (int64_t i = 0; i < args.rows; ++i) {
      load_row(static_cast<const T*>(args.image.data) + i * args.image.stride, 1, args.c, row.data);
      const int64_t first = i / kDepth * kDepth, depth = args.rows - first < kDepth ? args.rows - first : kDepth;
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t begin = panels.begin(p) * kLanes<A>, columns = panels.begin(p + 1) * kLanes<A> - begin;
        std::memcpy(packed.data + first * width + begin * depth + (i - first) * columns, row.data + begin,
                    static_cast<size_t>(columns) * sizeof(A));
      }
    }
    const Block<A> strip(kDepth, kStrip), sums(kStrip, args.c);
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < strips; ++unit) {
      const int64_t at = args.o * unit / strips, count = args.o * (unit + 1) / strips - at;
      sums.buffer.clear(kStrip * sums.stride);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * kDepth, depth = args.rows - first < kDepth ? args.rows - first : kDepth;
        for (int64_t i = 0; i < depth; ++i)
          load_row(static_cast<const T*>(args.grad.data) + (first + i) * args.grad.stride + at, 1, count,
                   strip.data + i * strip.stride);
        for (int64_t p = 0; p < panels.count; ++p) {
          const int64_t begin = panels.begin(p) * kLanes<A>, columns = panels.begin(p + 1) * kLanes<A> - begin;
          gemm_panel<A, true>(columns / kLanes<A>, round_up(count, kGemmRows), strip.data, strip.stride,
                              packed.data + first * width + begin * depth, columns, depth, nullptr, sums.data + begin,
                              sums.stride);
        }
      }
      store_rows(sums, 0, args.c, count, static_cast<T*>(args.out) + at * args.c, args.c);
    }
  }
}

}  // namespace

void conv1x1_backward_weight(const Conv1x1GradArgs& args, int threads) {
  dispatch(args.dtype, [&](auto element) { backward_weight<decltype(element)>(args, threads); });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
