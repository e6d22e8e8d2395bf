// The choice of a CPU kernel: every rule in one place, as pure functions of shapes, layouts, dtypes and
// the processor. Measurements
// are in docs/develop/tuning.md, under the heading that each rule names.
//
// Static, not inline: per-ISA units may not share code (isa.h).
#pragma once

#include "cpu/isa.h"
#include "wavemix/deconv.h"
#include "wavemix/haar.h"
#include "wavemix/mlp.h"
#include "wavemix/reduce_haar.h"

namespace wavemix::choose {

// Whether a channel's LL and bands of the one level follow each other in memory, for every channel in turn.
[[maybe_unused]] static bool bands_join(const HaarArgs& args) {
  constexpr int64_t kBytes[] = {8, 4, 2, 2};  // by DType
  const Bands& high = args.high[0];
  const auto address = [](const void* data) { return reinterpret_cast<uintptr_t>(data); };
  return args.levels == 1 && args.low[0].data == nullptr && args.ll.stride[1] == 4 && high.stride[1] == 4 &&
         high.stride[2] == 1 && high.stride[0] == args.ll.stride[0] && high.stride[3] == args.ll.stride[2] &&
         high.stride[4] == args.ll.stride[3] &&
         address(high.data) == address(args.ll.data) + kBytes[static_cast<int>(args.dtype)];
}

// Haar transforms go by vectors of channels where image and LL have contiguous channels, or where a channel's LL and
// bands follow each other; else by rows of pixels.
enum class Haar { by_rows, by_channels, by_channels_joined };
[[maybe_unused]] static Haar haar(const HaarArgs& args) {
  const bool channels_inner = args.image.stride[1] == 1 && args.image.stride[3] != 1;
  if (args.c <= 1 || !channels_inner) return Haar::by_rows;
  if (args.ll.stride[1] == 1) return Haar::by_channels;
  const bool whole = args.h % 2 == 0 && args.w % 2 == 0 && args.add.data == nullptr;
  return whole && bands_join(args) ? Haar::by_channels_joined : Haar::by_rows;
}

// 1x1 convolution and Haar: few channels fill no vector, so the transform comes first. "Few channels: reduce_haar".
enum class ReduceHaar { product_first, few_channels, matrix_units };
[[maybe_unused]] static ReduceHaar reduce_haar(const ReduceHaarArgs& args) {
  constexpr int64_t kFewChannels = 128;
  return args.levels == 1 && args.c * args.o <= kFewChannels ? ReduceHaar::few_channels : ReduceHaar::product_first;
}

// Forward: matrix units. "Matrix units".
[[maybe_unused]] static ReduceHaar reduce_haar_forward(const ReduceHaarArgs& args) {
  const ReduceHaar other = reduce_haar(args);
  const bool units = args.dtype == DType::bf16 && cpu_matrix_units();
  return units && other == ReduceHaar::product_first ? ReduceHaar::matrix_units : other;
}

// There four times the products cost less than a pass over the reduced image, up to so many channels. "Matrix units".
[[maybe_unused]] static bool level_in_weights(const ReduceHaarArgs& args) { return args.c <= 96; }

// Pointwise MLP: where weights outweigh the image, threads share hidden channels. "Few pixels: pointwise MLP". Matrix
// units serve the rest of bf16, and forward without dropout and a map of the second input a pass of their own. "Matrix
// units".
enum class Mlp { by_pixels, few_pixels, matrix_units };
// Rows from which they repay what orders the weights for matrix units.
constexpr int64_t kRowsForUnits = 64;
[[maybe_unused]] static bool mlp_few_pixels(const MlpArgs& args) {
  const bool able = args.b == 0 && args.p == 0.0;  // one input, no dropout
  const bool units = args.dtype == DType::bf16 && args.rows >= kRowsForUnits && cpu_matrix_units();
  return able && args.rows > 0 && args.rows < args.k && !units;
}
[[maybe_unused]] static Mlp mlp_forward(const MlpArgs& args) {
  if (mlp_few_pixels(args)) return Mlp::few_pixels;
  const bool able = args.dtype == DType::bf16 && args.p == 0.0 && args.scale == nullptr;
  return able && cpu_matrix_units() ? Mlp::matrix_units : Mlp::by_pixels;
}
[[maybe_unused]] static Mlp mlp_backward(const MlpArgs& args, const MlpGradArgs& grads) {
  const bool able = grads.out.data == nullptr;  // the output is not wanted again
  return able && mlp_few_pixels(args) ? Mlp::few_pixels : Mlp::by_pixels;
}

// Transposed convolution: minimal filtering saves products and pays in sums around them, which few channels do not
// repay. "Few channels: transposed convolution".
constexpr int64_t kDeconvFewChannels = 32 * 32;
enum class Deconv { minimal_filtering, few_channels, matrix_units };
[[maybe_unused]] static Deconv deconv(const DeconvArgs& args) {
  return args.f * args.o <= kDeconvFewChannels ? Deconv::few_channels : Deconv::minimal_filtering;
}

// Forward, and of the gradients the weight's alone: matrix units multiply bf16 by the definition. "Matrix units".
[[maybe_unused]] static Deconv deconv_forward(const DeconvArgs& args) {
  const bool units = args.dtype == DType::bf16 && args.f * args.o > kDeconvFewChannels / 4 && cpu_matrix_units();
  return units ? Deconv::matrix_units : deconv(args);
}
[[maybe_unused]] static Deconv deconv_backward(const DeconvArgs& args, const DeconvGradArgs& grads) {
  const bool able = grads.d_u.data == nullptr && args.output.data == nullptr;
  return able ? deconv_forward(args) : deconv(args);
}

}  // namespace wavemix::choose
