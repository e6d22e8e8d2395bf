// Haar analysis and synthesis on the CPU. Compiled once per instruction set (see isa.h).
//
// A level is three additions an element, so memory decides. All levels run in one pass: the LL rows between levels stay
// in the L1 cache in the arithmetic type, each input element is read once and each coefficient written once.

#include "cpu/choose.h"
#include "cpu/haar/channels.h"
#include "cpu/haar/rows.h"

namespace wavemix {
namespace WAVEMIX_ISA {
namespace {

enum class Direction { analysis, synthesis };

template <class T, Direction direction>
void run_by_rows(const HaarArgs& args, const Pyramid& size, int threads) {
  const int64_t rows = size.h[args.levels], units = args.n * args.c * rows;
  WAVEMIX_PARALLEL(threads) {
    Scratch scratch(RowWorker<T>::scratch_bytes(args, size));
    RowWorker<T> worker(args, size, scratch);
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t plane = unit / rows;
      worker.point_at(plane / args.c, plane % args.c);
      if (direction == Direction::analysis) {
        worker.analyse_unit(unit % rows);
      } else {
        worker.synthesise_unit(unit % rows);
      }
    }
  }
}

template <class T, Direction direction, bool joined>
void run_by_channels(const HaarArgs& args, const Pyramid& size, int threads) {
  const int64_t rows = size.h[args.levels], columns = size.w[args.levels];
  const int64_t chunks = (args.c + kChannelChunk - 1) / kChannelChunk;
  const int64_t units = args.n * rows * chunks * columns;
  WAVEMIX_PARALLEL(threads) {
    Scratch scratch(ChannelWorker<T>::scratch_bytes(args, size));
    ChannelWorker<T> worker(args, size, scratch);
    WAVEMIX_FOR
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t x = unit % columns, rest = unit / columns;
      worker.c0 = rest % chunks * kChannelChunk;
      worker.count = args.c - worker.c0 < kChannelChunk ? args.c - worker.c0 : kChannelChunk;
      worker.n = rest / chunks / rows;
      const int64_t y = rest / chunks % rows;
      if constexpr (direction == Direction::analysis) {
        joined ? worker.analyse_joined_unit(y, x) : worker.analyse_unit(y, x);
      } else {
        joined ? worker.synthesise_joined_unit(y, x) : worker.synthesise_unit(y, x);
      }
    }
  }
}

template <class T, Direction direction>
void run(const HaarArgs& args, int threads) {
  if (args.n == 0 || args.c == 0 || args.h == 0 || args.w == 0) return;
  const Pyramid size(args);
  const int64_t element = static_cast<int64_t>(sizeof(T));
  const int L = args.levels;
  if (direction == Direction::analysis) {
    const int64_t low[4] = {args.n, args.c, size.h[L], size.w[L]};
    advise(args.ll.data, args.ll.stride, low, element);
    for (int l = 1; l <= L; ++l) {
      const int64_t high[5] = {args.n, args.c, 3, size.h[l], size.w[l]};
      advise(args.high[l - 1].data, args.high[l - 1].stride, high, element);
      const int64_t kept[4] = {args.n, args.c, size.h[l], size.w[l]};
      advise(args.low[l - 1].data, args.low[l - 1].stride, kept, element);
    }
  } else {
    const int64_t full[4] = {args.n, args.c, args.h, args.w};
    advise(args.image.data, args.image.stride, full, element);
  }
  if (args.n * args.c * args.h * args.w < kSerialElements) threads = 1;
  switch (choose::haar(args)) {
    case choose::Haar::by_channels:
      return run_by_channels<T, direction, false>(args, size, threads);
    case choose::Haar::by_channels_joined:
      return run_by_channels<T, direction, true>(args, size, threads);
    case choose::Haar::by_rows:
      return run_by_rows<T, direction>(args, size, threads);
  }
}

}  // namespace

void haar_analysis(const HaarArgs& args, int threads) {
  dispatch(args.dtype, [&](auto element) { run<decltype(element), Direction::analysis>(args, threads); });
}
void haar_synthesis(const HaarArgs& args, int threads) {
  dispatch(args.dtype, [&](auto element) { run<decltype(element), Direction::synthesis>(args, threads); });
}

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
