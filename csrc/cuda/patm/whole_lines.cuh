// Shared by the backward kernels of the whole PATM: an image as the lines along which one branch convolves.
//
// Lines follow each other with as many empty places between them as a tap reaches. So one sequence of places has the
// image, thin or long, tiles are cut from it anywhere, and the two branches differ by strides alone.
//
// A warp owns half of the tile's places and 16 channels. A thread has both channels of a pair, or its two outputs, at
// four places.
#pragma once

#include "cuda/patm/whole.cuh"

namespace wavemix::whole {

constexpr int kGroups = 2;  // of places

template <int C>
constexpr int kLineThreads = 32 * kGroups * C / kStep;

struct Lines {
  int length, count, tiles, tiles_of_part;
  Divisor pitch;
};

// Images and parts of them as blocks: of an image's parts first those along W, then those along H.
struct Cut {
  Lines lines[2];
  int parts;  // of one branch
  Divisor of_image;

  // `places`: of a tile.
  Cut(const PatmArgs& args, int multiprocessors, int blocks, int places) {
    const int64_t at_once = std::max<int64_t>(1, multiprocessors) * blocks;
    const auto tiles_of = [&](int64_t count, int64_t length) { return ceil_div(count * (length + kReach), places); };
    const int64_t tiles[2] = {tiles_of(args.h, args.w), tiles_of(args.w, args.h)};
    const int64_t most = std::max(tiles[0], tiles[1]);
    if ((most + 2) * places > Divisor::kMaxDividend)
      throw std::invalid_argument("x: the lines of an image of " + std::to_string(args.h) + " x " +
                                  std::to_string(args.w) + " pixels are too many; up to 2147483647 places would work");
    // Such that the chip's turns take the least time; a part's start costs about as much as 128 places.
    int64_t least = INT64_MAX;
    for (int64_t k = 1; k <= std::min<int64_t>(most, 64); ++k) {
      const int64_t cost = ceil_div(2 * args.n * k, at_once) * (ceil_div(most, k) + ceil_div(128, places));
      if (cost < least) {
        least = cost;
        parts = static_cast<int>(k);
      }
    }
    for (int branch = 0; branch < 2; ++branch) {
      const int64_t length = branch == 0 ? args.w : args.h, count = branch == 0 ? args.h : args.w;
      lines[branch] = {static_cast<int>(length), static_cast<int>(count), static_cast<int>(tiles[branch]),
                       static_cast<int>(ceil_div(tiles[branch], parts)),
                       Divisor(static_cast<uint32_t>(length + kReach))};
    }
    of_image = Divisor(static_cast<uint32_t>(2 * parts));
  }
  int64_t rows(const PatmArgs& args) const { return args.n * parts; }  // partial sums of a branch
};

// Four places from a multiple of four on. Their pixels are of one line, since between two lines there are three places:
// the line, and where the first of the four stands in it, which may be before its beginning.
struct Four {
  int at, line, length;

  __device__ Four(const Lines& of, int first) {
    uint32_t value = static_cast<uint32_t>(first < 0 ? 0 : first);
    at = static_cast<int>(of.pitch.take(value));
    const int beyond = at >= of.length ? 1 : 0;
    at -= beyond * (of.length + kReach);
    line = static_cast<int>(value) + beyond;
    length = (first < 0) | (line >= of.count) ? 0 : of.length;
  }
  __device__ bool exists(int i) const { return static_cast<unsigned>(at + i) < static_cast<unsigned>(length); }
};

// Kernels along lines read this; it also says how an image is cut for them.
struct LineParams {
  Image image;
  Strides x, grad_strides;
  const void* grad;
  const void *z[2], *theta[2], *proj, *z_bias[2], *theta_bias[2];
  const float *scale[2], *shift[2], *taps[2], *a, *path;
  Lines lines[2];
  int64_t n, first_image;
  int parts;
  Divisor of_image;
};
inline LineParams line_params(const PatmArgs& args, const Plane& grad, const float* a, const Cut& cut) {
  const auto vector = [](const void* data) { return static_cast<const float*>(data); };
  return {image_of(args),
          strides_of(args.x, "x"),
          strides_of(grad, "grad"),
          grad.data,
          {args.z_h, args.z_w},
          {args.theta_h, args.theta_w},
          args.proj,
          {args.z_h_bias, args.z_w_bias},
          {args.theta_h_bias, args.theta_w_bias},
          {vector(args.scale_h), vector(args.scale_w)},
          {vector(args.shift_h), vector(args.shift_w)},
          {vector(args.taps_h), vector(args.taps_w)},
          a,
          vector(args.path),
          {cut.lines[0], cut.lines[1]},
          args.n,
          0,
          cut.parts,
          cut.of_image};
}
// A block for each part of each image, from `p.first_image` on.
template <int C, class Params>
void launch_lines(const char* name, void (*kernel)(Params), const PatmArgs& args, Params& p, size_t shared_bytes,
                  cudaStream_t stream) {
  Launch launch;
  launch.what = [&] { return std::string(name) + " (" + name_of(args.dtype) + ", " + std::to_string(C) + ")"; };
  launch.threads = kLineThreads<C>;
  launch.shared_bytes = shared_bytes;
  launch.stream = stream;
  const int64_t of_image = 2 * p.parts, most = WAVEMIX_MAX_BLOCKS, images = std::max<int64_t>(most / of_image, 1);
  for (; p.first_image < args.n; p.first_image += images) {
    launch.blocks = static_cast<unsigned>(std::min(images, args.n - p.first_image) * of_image);
    launch(kernel, p);
  }
}

// threadIdx.x, but the compiler does not keep through a loop what is computed from it.
__device__ inline uint32_t this_thread() { return static_cast<uint32_t>(here(static_cast<int64_t>(threadIdx.x))); }

// An 8x8 matrix of 16-bit elements as `ldmatrix_x4` leaves it in a warp's registers, transposed.
#if defined(__CUDACC__)
__device__ inline Fragment transposed(Fragment a) {
  Fragment d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
#else
inline Fragment transposed(Fragment a, WAVEMIX_SITE) {
  struct Move {
    Fragment from, to;
  };
  Move mine{a, 0};
  emulator::warp_operation(kWholeWarp, {file, line}, "transposed", &mine, [](void* const(&payloads)[emulator::kWarp]) {
    for (int lane = 0; lane < emulator::kWarp; ++lane) {
      const auto element = [&](int row) {  // in its column lane / 4
        return static_cast<const Move*>(payloads[4 * row + lane / 8])->from >> (lane / 4 % 2 * 16) & 0xffffu;
      };
      static_cast<Move*>(payloads[lane])->to = element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16;
    }
  });
  return mine.to;
}
#endif

// A block has one image, one branch, and these tiles of it.
struct LinePart {
  int64_t n;
  int branch, part, begin, end;

  __device__ explicit LinePart(const LineParams& p) {
    uint32_t of_image = blockIdx.x;
    const int part_of_both = static_cast<int>(p.of_image.take(of_image));
    n = p.first_image + of_image;
    branch = part_of_both >= p.parts ? 1 : 0;
    part = part_of_both - branch * p.parts;
    const Lines& lines = p.lines[branch];
    begin = part * lines.tiles_of_part;
    end = begin + lines.tiles_of_part < lines.tiles ? begin + lines.tiles_of_part : lines.tiles;
  }
};

// The steps of a block that the kernels along lines share.
template <class T, int C>
struct LineBlock {
  static constexpr int kThreads = kLineThreads<C>, kChunks = C / kStep;

  int group = static_cast<int>(threadIdx.x) % 32 / 4, member = static_cast<int>(threadIdx.x) % 4;
  int chunk = static_cast<int>(threadIdx.x) / 32 % kChunks;

  // A projection's rows, permuted; or the columns of `proj`, which its input's gradient is made with.
  __device__ void keep_projection(const void* matrix, SharedSpan<T> to) const {
    constexpr int kWords = C / kWord;
    for (int i = static_cast<int>(threadIdx.x); i < C * kWords; i += kThreads) {
      const int row = i / kWords, word = i % kWords;
      cp_async<16>(to + place<C>(row, word), static_cast<const T*>(matrix) + channel_of_row(row) * C + word * kWord);
    }
  }
  __device__ void keep_columns(const void* proj, SharedSpan<T> to) const {
    for (int i = static_cast<int>(threadIdx.x); i < C * C; i += kThreads) {
      const int row = i % C, k = i / C;
      to[place<C>(row, k / kWord) + k % kWord] = static_cast<const T*>(proj)[k * C + output_of_row<C>(row)];
    }
  }

  // A matrix's rows in memory, whose fragments come from the caches; `of_row` names them.
  template <class OfRow>
  __device__ void from_caches(const void* matrix, const OfRow& of_row, int step, Fragment (&a)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      a[k] = __ldg(reinterpret_cast<const Fragment*>(static_cast<const T*>(matrix) +
                                                     of_row(chunk * kStep + group + k % 2 * 8) * C + step * kStep +
                                                     k / 2 * 8 + 2 * member));
  }
};

// Sums of a block of `patm_mixed_gradients`, (n, 2, parts, kPartial): its branch's G, half of x's (the first half of
// the columns along W, the second along H), the gradient's sums (along W).
template <int C>
constexpr int kOfHalf = C * C;
template <int C>
constexpr int kOfBias = kOfHalf<C> + C * C / 2;
template <int C>
constexpr int kPartial = kOfBias<C> + C;
// From these to the gradients of the branch weights, (3, n, C), and of `proj` with its bias, (C C + C).
struct MixedSums {
  const float *partial, *a;
  int parts;
  float *d_a, *d_proj;
};
void sum_mixed(const PatmArgs& args, const MixedSums& sums, float* workspace, cudaStream_t stream);
int64_t mixed_floats(const PatmArgs& args);  // of the workspace

// out (groups, columns): sums over `rows` of partial (groups, rows, columns), each in one order. From column
// `more_from` on with what `more` holds (one group).
struct RowSums {
  const float* partial = nullptr;
  int rows = 0, columns = 0;
  int64_t groups = 0;
  float* out = nullptr;
  const float* more = nullptr;
  int more_from = INT32_MAX;
};
// Both in one launch.
void sum_rows(const RowSums& first, const RowSums& second, cudaStream_t stream);

}  // namespace wavemix::whole
