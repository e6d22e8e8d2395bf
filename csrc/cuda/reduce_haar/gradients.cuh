// One tile of reduce_haar's gradients: Z's and x's ways into shared memory, the synthesis, the two products.
//
// The synthesis' result g, rounded to the images' dtype, lies in shared memory for both products, by rows for d_x and
// by columns for d_weight, whose sums stay in registers from tile to tile. Where pixels are contiguous along W, x lies
// there by channels, and d_x is made transposed: a thread then has eight neighbouring pixels of a channel, elsewhere
// eight neighbouring channels of a pixel.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/reduce_haar/gradients_memory.cuh"

namespace wavemix::reduce_haar::gradients {

// kNorm: with sums of d_x and of d_x * (y - mean) for each channel, in channels_last order.
template <class T, int S, bool kAlongW, bool kNorm>
struct Block {
  static_assert(!(kAlongW && kNorm));
  using P = Places<S>;
  static constexpr int kMostSide = most_side(kAlongW);
  // A thread of the synthesis has a pair of outputs and one quad of each so many.
  static constexpr int kPairs = kOutputs * S / 2, kQuadsAtOnce = S < 3 ? kQuads : kQuads / 2;
  static_assert(kPairs * kQuadsAtOnce <= kThreads);

  const Params& p;
  SharedSpan<T> memory;
  uint32_t thread;
  int lane = static_cast<int>(thread % 32), warp = static_cast<int>(thread / 32);
  int group = lane / 4, member = static_cast<int>(thread % 4);
  // Channels_last: a warp makes d_x of 16 pixels and half the channels, a thread of pixels `group` and 8 behind, of
  // words of eight channels. Along W: of half the pixels and 16 channels of each 64, a thread of channels `group` and 8
  // behind, of one word of eight pixels. It copies x in the same places.
  int quarter = static_cast<int>(thread / 32 % 4), half = static_cast<int>(thread / 128);

  __device__ SharedSpan<T> weight() const { return memory; }
  __device__ SharedSpan<T> gradient() const { return memory + P::kWeight; }
  __device__ SharedSpan<T> stage(int tile) const {
    return memory + (P::kWeight + P::kGradient + (tile & 1) * P::kStage);
  }
  __device__ int channel(int j, int second) const {
    return kAlongW ? kChannels * j + 16 * quarter + group + 8 * second : (4 * (half * S + j) + member) * kWord;
  }
  __device__ int pixel(int second) const { return 16 * quarter + group + 8 * second; }
  __device__ int word() const { return 4 * half + member; }

  // Where the thread's parts of x and d_x lie. Channels_last: numbers of two pixels; along W: an image and its pixel.
  // The first, or each, is -1 where there is none.
  struct Position {
    int at[2];
  };
  __device__ Position position_of(int tile) const {
    if constexpr (kAlongW) {
      const Pixel first = pixel_of_word(p, tile, word(), 0);
      return {{first.image, first.number}};
    } else {
      return {{pixel_of(p, tile, 0, pixel(0)), pixel_of(p, tile, 0, pixel(1))}};
    }
  }
  __device__ bool exists(const Position& of, int j, int second) const {
    return of.at[kAlongW ? 0 : second] >= 0 && channel(j, second) < p.c;
  }
  __device__ int64_t offset(const Position& of, int j, int second) const {
    const int64_t c = channel(j, second);
    if constexpr (kAlongW) {
      return (static_cast<int64_t>(of.at[0]) * p.c + c) * (p.h * p.w) + of.at[1];
    } else {
      return static_cast<int64_t>(of.at[second]) * p.c + c;
    }
  }

  __device__ int64_t offset_of_add(const Position& of, int j, int second) const {
    if constexpr (!kNorm) {
      return offset(of, j, second);
    } else {
      uint32_t row = static_cast<uint32_t>(here(of.at[second]));  // anew each time, for the registers
      p.sharing.take(row);
      return static_cast<int64_t>(row) * p.c + channel(j, second);
    }
  }

  // --- Into shared memory

  // Channels_last: channel 8 m + 2 t + e of 32 goes to place 8 t + 2 m + e: the product's columns 2 m and 2 m + 1 of
  // four tiles t, which are one thread's, are then neighbours in d_x.
  __device__ void load_weight() const {
    constexpr int kRowPairs = kChannels * S / 2;
    const SharedSpan<Fragment> target = shared_cast<Fragment>(weight());
#pragma unroll 2
    for (int i = static_cast<int>(thread); i < kOutputs * S * kRowPairs; i += kThreads) {
      const int o = i / kRowPairs, at = i % kRowPairs, pair = kAlongW ? at : (at & ~15) | (at & 3) << 2 | (at >> 2 & 3);
      Fragment bits = 0;
      if (o < p.o && 2 * pair < p.c) bits = __ldg(static_cast<const Fragment*>(p.weight) + (o * (p.c / 2) + pair));
      target[o * (P::kChannelRow / 2) + at] = bits;
    }
  }

  // The thread's part `j`, `second` of x in shared memory.
  __device__ SharedSpan<T> x_place(SharedSpan<T> x, int j, int second) const {
    const int c = channel(j, second);
    if constexpr (kAlongW) {
      return x + (c * kPixels + word_place(group, word()) * kWord);
    } else {
      return x + (pixel(second) * P::kChannelRow + c);
    }
  }

  template <int pairs>
  __device__ void fetch_x(const Position& of, SharedSpan<T> x) const {
#pragma unroll
    for (int j = 0; j < S; ++j) {
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const SharedSpan<T> target = x_place(x, j, second);
        if (exists(of, j, second)) {
          cp_async<4 * pairs>(target, static_cast<const T*>(p.x) + offset(of, j, second));
        } else {
          using Word = typename WordOf<4 * pairs>::type;
          shared_cast<Word>(target)[0] = Word{};
        }
      }
    }
  }

  // Starts the copies of a tile; the thread's own positions are wanted again for d_x.
  __device__ void fetch(int tile, Position& of) const {
    const SharedSpan<T> x = stage(tile), z = x + P::kX;
    of = position_of(tile);
    if (!kAlongW || p.in_words) {
      fetch_x<4>(of, x);
    } else {
#pragma unroll 1
      for (int pair = 0; pair < 4; ++pair) {
        const Pixel first = pixel_of_word(p, tile, word(), pair);
        fetch_x<1>({{first.image, first.number}}, x + 2 * pair);
      }
    }
#pragma unroll 1
    for (int i = warp; i < first_row(kAlongW, p.levels + 1); i += kWarps) {
      int level = 1;
#pragma unroll
      for (int next = 2; next <= kMaxHaarLevels; ++next) level += i >= first_row(kAlongW, next);
      const int pixel = pixel_of(p, tile, level, i - first_row(kAlongW, level));
      if (pixel < 0) continue;
      const T* const source = static_cast<const T*>(p.z[level - 1]) + static_cast<int64_t>(pixel) * p.z_row[level - 1];
      for (int e = lane * kWord; e < 4 * p.o; e += 32 * kWord) cp_async<16>(z + (i * P::kZRow + e), source + e);
    }
    cp_async_commit();
  }

  // --- The synthesis

  // LL of a pair of outputs in `low`, to which this level's own is added, and the bands.
  __device__ void get_bands(SharedSpan<T> pixel, int pair, float (&low)[2], float (&bands)[3][2]) const {
    float own[2], mixed[3][2];
    get(pixel + 2 * pair, own);
#pragma unroll
    for (int k = 0; k < 3; ++k) get(pixel + (p.o + 6 * pair + 2 * k), mixed[k]);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      low[e] += own[e];
#pragma unroll
      for (int b = 0; b < 3; ++b) bands[b][e] = mixed[(3 * e + b) / 2][(3 * e + b) % 2];
    }
  }

  // The row of g that has a corner of a quad, its pixels left or right of it following: in Z-order, or in words' order.
  __device__ int row_of_corner(int quad, int below) const {
    if constexpr (kAlongW) {
      const bool fours = p.side_shift == 2;  // squares of four quads
      const int down = fours ? quad & 2 : 0, along = fours ? quad >> 2 << 1 | (quad & 1) : quad;
      return row_of((down + below) << (6 - p.side_shift) | 2 * along);
    } else {
      return 4 * quad + 2 * below;
    }
  }

  // g of the tile, and its sums over the thread's quads; zeros for what does not exist.
  __device__ void synthesise(int tile, float (&sums)[2]) const {
    const SharedSpan<T> z = stage(tile) + P::kX, g = gradient();
    const int pair = static_cast<int>(thread % kPairs), per_square = p.side_shift - 1;
    if (thread >= kPairs * kQuadsAtOnce) return;
#pragma unroll 1
    for (int quad = static_cast<int>(thread / kPairs); quad < kQuads; quad += kQuadsAtOnce) {
      const uint32_t square = first_square(p, tile) + (static_cast<uint32_t>(quad) >> 2 * per_square);
      float low[2] = {}, bands[3][2] = {};
      if (square < p.squares && pair < p.o / 2) {
#pragma unroll 1
        for (int level = p.levels; level > 1; --level) {
          int in_level = quad >> 2 * (level - 1), corner = quad >> 2 * (level - 2) & 3;
          if (level > kMostSide) {
            const Square at = square_of(p, square);
            in_level = kAlongW ? quad >> 3 : 0;
            corner = (at.left >> (level - kMostSide - 1) & 1) | (at.top >> (level - kMostSide - 1) & 1) << 1;
          }
          get_bands(z + (first_row(kAlongW, level) + in_level) * P::kZRow, pair, low, bands);
          const float across = corner & 1 ? -0.5f : 0.5f, down = corner & 2 ? -1.0f : 1.0f;
#pragma unroll
          for (int e = 0; e < 2; ++e)
            low[e] = 0.5f * (low[e] + down * bands[0][e]) + across * (bands[1][e] + down * bands[2][e]);
        }
        get_bands(z + quad * P::kZRow, pair, low, bands);
      }
      float corners[4][2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float top = low[e] + bands[0][e], bottom = low[e] - bands[0][e];
        const float top_high = bands[1][e] + bands[2][e], bottom_high = bands[1][e] - bands[2][e];
        corners[0][e] = 0.5f * (top + top_high);
        corners[1][e] = 0.5f * (top - top_high);
        corners[2][e] = 0.5f * (bottom + bottom_high);
        corners[3][e] = 0.5f * (bottom - bottom_high);
        sums[e] += 2 * low[e];
      }
#pragma unroll
      for (int k = 0; k < 4; ++k)
        put(g + ((row_of_corner(quad, k / 2) + k % 2) * P::kOutputRow + 2 * pair), corners[k]);
    }
  }

  // --- The products

  __device__ static void multiply(float (&sums)[4], const Fragment (&a)[4], Fragment low, Fragment high) {
    const Fragment b[2] = {low, high};
    mma_m16n8k16<T>(sums, a, b);
  }

  // Columns 8 (warp S + i) and on of d_weight, all rows.
  __device__ void multiply_weight(int tile, float (&products)[S][S][4]) const {
    const SharedSpan<T> x = stage(tile), g = gradient();
#pragma unroll
    for (int first = 0; first < kPixels; first += 32) {
      Fragment b[S][4];
#pragma unroll
      for (int i = 0; i < S; ++i) {
        const int column = (warp * S + i) * 8;
        if constexpr (kAlongW) {
          ldmatrix_x4<false>(b[i],
                             x + ((column + lane % 8) * kPixels + word_place(lane % 8, first / 8 + lane / 8) * kWord));
        } else {
          ldmatrix_x4<true>(b[i], x + ((first + lane) * P::kChannelRow + column));
        }
      }
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int pixel = first + 16 * step + lane / 16 * 8 + lane % 8, row = kAlongW ? row_of(pixel) : pixel;
#pragma unroll
        for (int m = 0; m < S; ++m) {
          Fragment a[4];
          ldmatrix_x4<true>(a, g + (row * P::kOutputRow + (2 * m + lane / 8 % 2) * kWord));
#pragma unroll
          for (int i = 0; i < S; ++i) multiply(products[m][i], a, b[i][2 * step], b[i][2 * step + 1]);
        }
      }
    }
  }

  static constexpr int kAhead = S < 2 ? 1 : 2;
  // Both words j of `add`.
  __device__ void load_add(const Position& of, int j, Raw<T, kWord> (&add)[2][S]) const {
    if (p.add == nullptr || (kAlongW && !p.in_words)) return;
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      if (exists(of, j, second))
        wavemix::fetch<T, kWord>(static_cast<const T*>(p.add) + offset_of_add(of, j, second), add[second][j]);
    }
  }

  // Fragments of step `step` of d_x, or of d_x transposed: rows of the thread's words j, columns of two tiles t.
  __device__ void load_rows(int j, int step, Fragment (&a)[4]) const {
    if constexpr (kAlongW) {
      const int o = 16 * step + lane / 16 * 8 + lane % 8, c = kChannels * j + 16 * quarter + lane / 8 % 2 * 8;
      ldmatrix_x4<true>(a, weight() + (o * P::kChannelRow + c));
    } else {
      ldmatrix_x4<false>(a, gradient() + ((16 * quarter + lane % 16) * P::kOutputRow + (2 * step + lane / 16) * kWord));
    }
  }
  __device__ void load_columns(int j, int step, int t, Fragment (&b)[4]) const {
    if constexpr (kAlongW) {
      const int pixel = 32 * half + lane % 8 / 2 * 8 + 2 * (t + lane / 16) + lane % 2;
      ldmatrix_x4<false>(b, gradient() + (row_of(pixel) * P::kOutputRow + (2 * step + lane / 8 % 2) * kWord));
    } else {
      const int c = (4 * (half * S + j) + t + lane / 16) * kWord;
      ldmatrix_x4<true>(b, weight() + ((16 * step + lane % 16) * P::kChannelRow + c));
    }
  }

  template <int N>
  __device__ void store_d_x(int64_t at, const float (&values)[N]) const {
    store(static_cast<T*>(p.d_x) + at, values);
  }

  // A word of d_x in pieces of two pixels, whose places are computed here and nowhere before: the rare branch may hold
  // no registers of the others.
  __device__ void store_pairs(int tile, int j, int second, const float (&values)[kWord]) const {
    const Block again{p, memory, static_cast<uint32_t>(here(static_cast<int64_t>(threadIdx.x)))};
#pragma unroll 1
    for (int pair = 0; pair < 4; ++pair) {
      const Pixel first = pixel_of_word(p, static_cast<int>(here(tile)), again.word(), pair);
      const Position of = {{first.image, first.number}};
      if (!exists(of, j, second)) continue;
      float both[2] = {values[0], values[1]}, add[2];
#pragma unroll
      for (int k = 1; k < 4; ++k) {
        both[0] = pair == k ? values[2 * k] : both[0];
        both[1] = pair == k ? values[2 * k + 1] : both[1];
      }
      const int64_t at = offset(of, j, second);
      if (p.add != nullptr) {
        load(static_cast<const T*>(p.add) + at, add);
        both[0] += add[0];
        both[1] += add[1];
      }
      store_d_x(at, both);
    }
  }

  // y in the places of x, which every warp is done with: each thread reads what it copied itself.
  __device__ void fetch_y(int tile, const Position& of) const {
#pragma unroll
    for (int j = 0; j < S; ++j) {
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        if (exists(of, j, second))
          cp_async<16>(x_place(stage(tile), j, second), static_cast<const T*>(p.y) + offset(of, j, second));
      }
    }
    cp_async_commit();
  }

  // The thread's two totals of word j: sums of d_x or the others, of two channels, over the quarter's pixels.
  __device__ SharedSpan<float> totals(int j) const {
    const int at = quarter * P::kOfQuarter + group / 4 * P::kOfSum + channel(j, 0) + 2 * (group % 4);
    return shared_cast<float>(memory + P::kElements) + at;
  }

  // Adds a warp's sums over its pixels, of eight channels each: lane 4 group + member gets two of the member's 16.
  __device__ void add_up(float (&of_thread)[2][kWord], SharedSpan<float> total) const {
    const bool top = group & 4, upper = group & 2, odd = group & 1;
#pragma unroll
    for (float (&of)[kWord] : of_thread) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float other = __shfl_xor_sync(kWholeWarp, upper ? of[e] : of[4 + e], 8);
        of[e] = (upper ? of[4 + e] : of[e]) + other;
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float other = __shfl_xor_sync(kWholeWarp, odd ? of[e] : of[2 + e], 4);
        of[e] = (odd ? of[2 + e] : of[e]) + other;
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float other = __shfl_xor_sync(kWholeWarp, top ? of_thread[0][e] : of_thread[1][e], 16);
      total[e] = total[e] + ((top ? of_thread[1][e] : of_thread[0][e]) + other);
    }
  }

  // kAhead words of `add` are on their way.
  __device__ void multiply_x(int tile, const Position& of, Raw<T, kWord> (&add)[2][S]) const {
#pragma unroll
    for (int j = 0; j < S; ++j) {
      float sums[4][4] = {};
#pragma unroll
      for (int step = 0; step < S; ++step) {
        Fragment a[4];
        load_rows(j, step, a);
#pragma unroll
        for (int t = 0; t < 4; t += 2) {
          Fragment b[4];
          load_columns(j, step, t, b);
          multiply(sums[t], a, b[0], b[1]);
          multiply(sums[t + 1], a, b[2], b[3]);
        }
      }
      float of_thread[2][kWord] = {};
      if (kNorm && j == 0) cp_async_wait<0>();
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        float values[kWord] = {};
        const bool in_words = !kAlongW || p.in_words;
        if (in_words && !exists(of, j, second)) continue;
        if (in_words && p.add != nullptr) widen<T, kWord>(add[second][j], values);
#pragma unroll
        for (int e = 0; e < kWord; ++e) values[e] += sums[e / 2][2 * second + e % 2];
        if constexpr (kNorm) {
#pragma unroll
          for (int e = 0; e < kWord; e += 2) {
            float y[2], mean[2];
            get(x_place(stage(tile), j, second) + e, y);
            wavemix::load(p.mean + here(channel(j, 0) + e), mean);  // anew each time, for the registers
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              of_thread[0][e + k] += values[e + k];
              of_thread[1][e + k] += values[e + k] * (y[k] - mean[k]);
            }
          }
        }
        if (in_words) {
          store_d_x(offset(of, j, second), values);
        } else {
          store_pairs(tile, j, second, values);
        }
      }
      if constexpr (kNorm) add_up(of_thread, totals(j));
      if (j + kAhead < S) load_add(of, j + kAhead, add);
    }
  }

  // --- The sums

  __device__ void store_sums(const float (&products)[S][S][4], const float (&sums)[2]) const {
    float* const d_weight = p.sums + static_cast<int64_t>(blockIdx.x) * p.size;
#pragma unroll
    for (int m = 0; m < S; ++m) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int o = 16 * m + 8 * k + group;
#pragma unroll
        for (int i = 0; i < S; ++i) {
          const int c = (warp * S + i) * kWord + 2 * member;
          if (o >= p.o || c >= p.c) continue;
          const float both[2] = {products[m][i][2 * k], products[m][i][2 * k + 1]};
          store(d_weight + (o * p.c + c), both);
        }
      }
    }
    __syncthreads();  // the stages are free
    const SharedSpan<float> by_thread = shared_cast<float>(stage(0));
    if (thread < kPairs * kQuadsAtOnce) {
      by_thread[2 * thread] = sums[0];
      by_thread[2 * thread + 1] = sums[1];
    }
    __syncthreads();
    if constexpr (kNorm) {
      for (int i = static_cast<int>(thread); i < 2 * p.c; i += kThreads) {
        const int at = i < p.c ? i : P::kOfSum + i - p.c;
        float sum = 0;
        for (int k = 0; k < 4; ++k) sum += shared_cast<float>(memory + P::kElements)[k * P::kOfQuarter + at];
        d_weight[p.o * p.c + p.o + i] = sum;
      }
    }
    if (static_cast<int>(thread) >= p.o) return;
    float sum = 0;
    for (int quad = 0; quad < kQuadsAtOnce; ++quad) sum += by_thread[2 * kPairs * quad + thread];
    d_weight[p.o * p.c + thread] = sum;
  }
};

}  // namespace wavemix::reduce_haar::gradients
