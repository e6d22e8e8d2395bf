// Shared by the backward kernels of the whole PATM: an image as the lines along which one branch convolves.
//
// Lines follow each other with as many empty places between them as a tap reaches. So one sequence of places has the
// image, thin or long, tiles are cut from it anywhere, and the two branches differ by strides alone. What a convolution
// finds beyond its tile lies in a ring of three tiles in shared memory: of each pair of channels a line of words, one
// for each place.
//
// A warp owns 16 places and 16 channels. A thread has both channels of a pair, or its two outputs, at four places.
#pragma once

#include "cuda/patm/whole.cuh"

namespace wavemix::whole {

constexpr int kGroups = 2;  // of 16 places
constexpr int kPlaces = kGroups * kStep;
constexpr int kRing = 3 * kPlaces;    // words of a line
constexpr int kLine = kRing + kStep;  // an odd multiple of 16: eight lines fill the banks evenly
constexpr int kMargin = 4;            // places beyond an end, a whole word of 16 bytes

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
  Cut(const PatmArgs& args, int multiprocessors, int blocks, int places = kPlaces) {
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

// A tensor's address in elements: of image n, then by place and line of a branch.
struct Strides {
  int64_t n;
  int place[2], line[2];
};
inline Strides strides_of(const Plane& plane, const char* name) {
  for (int k : {2, 3})
    if (plane.stride[k] > INT32_MAX)
      throw std::invalid_argument(std::string(name) + ": got a stride of " + std::to_string(plane.stride[k]) +
                                  " elements from one pixel to the next; up to 2147483647 would work");
  const int h = static_cast<int>(plane.stride[2]), w = static_cast<int>(plane.stride[3]);
  return {plane.stride[0], {w, h}, {h, w}};
}

// Where a thread's four places of a tile lie: which of them are pixels, and these pixels' numbers.
struct Four {
  unsigned mask = 0;
  int pixel = 0, step = 0, until_next = 0, to_next = 0;

  Four() = default;
  __device__ Four(const Lines& of, int first, int step_of_place, int step_of_line) : step(step_of_place) {
    const int pitch = of.length + kReach;
    uint32_t value = static_cast<uint32_t>(first);
    const int at = static_cast<int>(of.pitch.take(value)), line = static_cast<int>(value);
    pixel = at * step_of_place + line * step_of_line;
    until_next = pitch - at;
    to_next = step_of_line - pitch * step_of_place;
    const int here = of.length - at, next = of.length < 4 ? of.length : 4;
    if (line < of.count && here > 0) mask = here < 4 ? (1u << here) - 1 : 15u;
    if (line + 1 < of.count && until_next < 4) mask |= ((1u << next) - 1) << until_next;
  }
  __device__ bool exists(int i) const { return (mask >> i & 1u) != 0; }
  __device__ int at(int i) const { return pixel + i * step + (i < until_next ? 0 : to_next); }
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

__device__ constexpr int after(int slot) { return slot == 2 ? 0 : slot + 1; }  // of three

// The steps of a block that the kernels along lines share.
template <class T, int C>
struct LineBlock {
  static constexpr int kThreads = kLineThreads<C>, kChunks = C / kStep, kTile = kPlaces * C;
  using Products = float[2][4];  // [two places][row, row + 8 by place]

  int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int group = lane / 4, member = lane % 4;
  int chunk = warp % kChunks, first = warp / kChunks * kStep;

  __device__ int channel() const { return 16 * chunk + 2 * group; }  // and the next
  __device__ int pair() const { return 8 * chunk + group; }          // outputs: this and the one C / 2 above

  // Rows of a tile; zeros where there is no pixel.
  __device__ void fetch(const T* source, const Strides& strides, int branch, const Lines& lines, int tile,
                        SharedSpan<T> to) const {
    constexpr int kWords = C / kWord;
    static_assert(kThreads % kWords == 0, "a thread keeps to one word of the rows, as in map_rows");
    const int word = static_cast<int>(threadIdx.x) % kWords;
#pragma unroll
    for (int row = static_cast<int>(threadIdx.x) / kWords; row < kPlaces; row += kThreads / kWords) {
      uint32_t line = static_cast<uint32_t>(tile * kPlaces + row / kStep * kStep + pixel_of(row % kStep));
      const int at = static_cast<int>(lines.pitch.take(line));
      if (at < lines.length && static_cast<int>(line) < lines.count) {
        cp_async<16>(to + place<C>(row, word), source + static_cast<int64_t>(at) * strides.place[branch] +
                                                   static_cast<int64_t>(line) * strides.line[branch] + word * kWord);
      } else {
        shared_cast<uint4>(to + place<C>(row, word))[0] = uint4{};
      }
    }
  }

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

  // Products of matrices, one behind the other in memory, with the warp's places of a tile, all from one read of these.
  template <class... Sums>
  __device__ void multiply_places(SharedSpan<T> tile, SharedSpan<T> matrices, Sums&... sums) const {
#pragma unroll
    for (int step = 0; step < C / kStep; ++step) {
      Fragment b[4], a[4];
      load_columns<C>(b, tile, first, step);
      int row = chunk * kStep;
      ((load_rows<C>(a, matrices, row, step), multiply<T>(sums, a, b), row += C), ...);
    }
  }

  // The line's words at this thread's places of a slot of the ring.
  __device__ int at(int slot) const { return slot * kPlaces + first + 4 * member; }
  // From four places before them on: twelve, as words of two elements.
  __device__ void around(SharedSpan<uint32_t> line, int slot, uint4 (&words)[3]) const {
    const int here = at(slot);
    words[0] = shared_cast<uint4>(line + ((here == 0 ? kRing : here) - kMargin))[0];
    words[1] = shared_cast<uint4>(line + here)[0];
    words[2] = shared_cast<uint4>(line + (here + kMargin == kRing ? 0 : here + kMargin))[0];
  }
  __device__ static void unpack(const uint4 (&words)[3], float (&values)[2][3 * kMargin]) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      T elements[8];
      memcpy(static_cast<void*>(elements), &words[i], sizeof(words[i]));
#pragma unroll
      for (int k = 0; k < 8; ++k) values[k % 2][4 * i + k / 2] = widen(elements[k]);
    }
  }

  // Taps in shared memory, [output of the pair][channel of the pair][taps 0 - 3, 4 - 6][pair][4]: 16 C floats.
  __device__ static void keep_taps(const float* taps, SharedSpan<float> to) {
    for (int i = static_cast<int>(threadIdx.x); i < 16 * C; i += kThreads) {
      const int half = i / (8 * C), even = i / (4 * C) % 2, tap = i / (2 * C) % 2 * 4 + i % 4, of = i / 4 % (C / 2);
      to[i] = tap < kPhaseTaps ? taps[((of + half * (C / 2)) * 2 + even) * kPhaseTaps + tap] : 0.0f;
    }
  }
  __device__ void load_taps(SharedSpan<float> taps, int half, int even, float (&tap)[8]) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float4 quad = shared_cast<float4>(taps + (((half * 2 + even) * 2 + k) * (C / 2) + pair()) * 4)[0];
      memcpy(tap + 4 * k, &quad, sizeof(quad));
    }
  }

  // Adds up over the threads that have the same rows, which all call: over members, then over groups of places, in
  // `scratch` (C / 2 floats a value). `keep(value, pair, sum)` takes each sum once.
  template <int N, class Keep>
  __device__ void add_up(float (&sums)[N], SharedSpan<float> scratch, const Keep& keep) const {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      sums[k] += __shfl_xor_sync(kWholeWarp, sums[k], 1);
      sums[k] += __shfl_xor_sync(kWholeWarp, sums[k], 2);
    }
    static_assert(kGroups == 2, "the second group of places hands its sums to the first");
    __syncthreads();
    if (first != 0 && member == 0) {
#pragma unroll
      for (int k = 0; k < N; ++k) scratch[k * (C / 2) + pair()] = sums[k];
    }
    __syncthreads();
    if (first == 0 && member == 0) {
#pragma unroll
      for (int k = 0; k < N; ++k) keep(k, sums[k] + scratch[k * (C / 2) + pair()]);
    }
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
