// The pointwise MLP of bf16 by matrix units, forward and without dropout: a block of rows goes from x to the output in
// a thread's caches. Compiled once per instruction set, for those that can have such units.

#include "cpu/mlp/matrix_units.h"

#include "cpu/common/products.h"
#include "cpu/mlp/gelu_of_bf16.h"

namespace wavemix {
namespace WAVEMIX_ISA {

#if WAVEMIX_MATRIX_UNITS
namespace {

// Rows at a time: their hidden layer fits the L2 cache beside the weights, and each tile of these is used four times.
constexpr int64_t kRows = 64;

// Some rows of [x | second] as a left operand, where they lie if they are whole tiles, else copied to `block`.
Left rows_of(const MlpArgs& args, int64_t first, int64_t rows, bf16* block) {
  const auto from = [&](const Matrix& m) { return static_cast<const bf16*>(m.data) + first * m.stride; };
  const int64_t wide = round_up(args.a + args.b, kTileDepth);
  if (args.b == 0 && args.a == wide && rows % kTileRows == 0) return {from(args.x), args.x.stride, wide / kTileDepth};
  copy_rows(from(args.x), args.x.stride, rows, args.a, block, wide);
  for (int64_t i = 0; i < rows && args.b > 0; ++i)
    std::memcpy(block + i * wide + args.a, from(args.second) + i * args.second.stride,
                static_cast<size_t>(args.b) * sizeof(bf16));
  return {block, wide, wide / kTileDepth};
}

}  // namespace

void mlp_matrix_units_forward(const MlpArgs& args, const Matrix& out, int threads) {
  if (args.rows == 0) return;
  if (args.rows * args.k < kSerialElements) threads = 1;
  advise<2>(out.data, {out.stride, 1}, {args.rows, args.o}, int64_t{sizeof(bf16)});
  const int64_t inputs = args.a + args.b, hidden = round_up(args.k, kTileDepth);
  const RightOperand<bf16, float> w1(inputs, args.k, static_cast<const bf16*>(args.w1), 1, inputs, threads);
  const RightOperand<bf16, float> w2(args.k, args.o, static_cast<const bf16*>(args.w2), 1, args.k, threads);
  const ZeroBuffer<float> b1(hidden), b2(padded<float>(args.o));
  if (args.b1 != nullptr) load_row(static_cast<const bf16*>(args.b1), 1, args.k, b1.data);
  if (args.b2 != nullptr) load_row(static_cast<const bf16*>(args.b2), 1, args.o, b2.data);
  const int64_t share = round_up((args.rows + threads - 1) / threads, kTileRows);
  const int64_t at_once = share < kRows ? share : kRows, count = (args.rows + at_once - 1) / at_once;
  WAVEMIX_PARALLEL(threads) {
    const MatrixUnits units(true);
    const ZeroBuffer<float> memory(kRows * (round_up(inputs, kTileDepth) + hidden) / 2);
    bf16* const block = reinterpret_cast<bf16*>(memory.data);
    bf16* const h = block + kRows * round_up(inputs, kTileDepth);
    WAVEMIX_FOR
    for (int64_t part = 0; part < count; ++part) {
      const int64_t first = part * at_once, rows = args.rows - first < at_once ? args.rows - first : at_once;
      const int64_t whole = round_up(rows, kTileRows);
      const Left x = rows_of(args, first, rows, block);
      product_by_blocks(whole, padded<float>(args.k), x, w1.tiles(), b1.data,
                        [=, &args](int64_t i, int64_t j, const float* values) {
                          const int64_t end = whole - i < kBlock ? whole - i : kBlock;
                          const uint32_t mask = lanes(args.k - j);
                          for (int64_t row = 0; row < end; ++row) {
                            const float* from = values + row * kBlock;
                            const __m512i both =
                                narrow(gelu_of_bf16(_mm512_loadu_ps(from)), gelu_of_bf16(_mm512_loadu_ps(from + 16)));
                            _mm512_storeu_si512(h + (i + row) * hidden + j, _mm512_maskz_mov_epi16(mask, both));
                          }
                        });
      bf16* const to = static_cast<bf16*>(out.data) + first * out.stride;
      product_by_blocks(whole, padded<float>(args.o), Left{h, hidden, hidden / kTileDepth}, w2.tiles(), b2.data,
                        stores_rounded(to, rows, args.o, out.stride));
    }
  }
}
#else
void mlp_matrix_units_forward(const MlpArgs&, const Matrix&, int) {}  // choose.h: never called
#endif

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
