// The gradients of PATM's branch weights and output projection, from x and the output's gradient.
//
// Both follow from one matrix for each image and branch, G = sum over its pixels of grad times the branch: the branch
// weights' gradient is the diagonal of proj^T G, and proj's is the sum of all G, columns times branch weights. So no
// pixel takes proj. The third branch is linear in x: its G is that of x times a matrix.
//
// A block takes one branch of an image along its lines, 128 places a step. Waves go to shared memory, of each pair a
// line of words (even channel, odd channel). A convolution is a product on tensor cores: 16 windows of 16 places times
// a band of taps give eight places each. Taps are in two parts, so that they count in full. What is convolved takes the
// places of the waves, and is one factor of G; it ends four places before the waves, of which the last eight stay.
#include "cuda/patm/whole_lines.cuh"

namespace wavemix::whole::mixed {

template <int C>
constexpr int kBlocks = C == 64 ? 2 : 1;
constexpr int kStretch = 128;          // places of a step
constexpr int kLate = 4;               // places by which what is convolved ends before the waves
constexpr int kWords = 160;            // of a line: the last eight of the step before, the step's, and to whole banks
constexpr int kOutputs = 2;            // 16 bytes of a line at which the step's places, and then the outputs, begin
constexpr int kEnd = 8 * kLate;        // and at which the step's last eight places begin
constexpr int kBand = kPhaseTaps + 1;  // taps of an output, and a zero
enum Constant { kZBias, kScale, kShift, kConstants };  // each C

template <class T, int C>
struct Places {
  static constexpr int kGradRows = kStretch + kLate;
  // In elements: z and theta, one tile each.
  static constexpr int kX = 2 * C * C, kGrad = kX + kStretch * C, kLines = kGrad + kGradRows * C;
  static constexpr int kFloats = kLines + 2 * C * kWords;
  // In floats: taps in two words, high and low.
  static constexpr int kConstantsAt = 2 * C * kBand;
  static constexpr size_t kBytes = size_t{2} * kFloats + size_t{4} * (kConstantsAt + kConstants * C) + kStretch;
};

struct Params : LineParams {
  float* partial;  // (n, 2, parts, kPartial)
};

// The word at which 16 bytes of a line begin. Eight lines, the lines of two neighbouring pairs for four words, or every
// second word of one line lie in different banks.
__device__ constexpr int word_of(int line, int at) {
  const int of_line = (line & 1) << 2 | (line & 2) | (line >> 2 & 1);
  return line * kWords + ((at ^ (at >> 3 & 1)) ^ of_line) * 4;
}

template <class T, int C>
struct Mixed {
  using P = Places<T, C>;
  using Products = float[2][4];  // [two places][channel of the pair, place]
  static constexpr int kThreads = kLineThreads<C>, kChunks = C / kStep, kPairs = C / 32;
  static constexpr int kTogether = C == 128 ? 1 : 2, kUnroll = C == 128 ? 2 : 4;
  const Params& p;
  const LinePart& own;
  SharedSpan<T> memory;
  SharedSpan<float> floats;
  int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int group = lane / 4, member = lane % 4, chunk = warp % kChunks, half = warp / kChunks;

  __device__ const Lines& lines() const { return p.lines[own.branch]; }
  __device__ SharedSpan<T> x() const { return memory + P::kX; }
  __device__ SharedSpan<T> grad() const { return memory + P::kGrad; }
  __device__ SharedSpan<uint32_t> words() const { return shared_cast<uint32_t>(memory + P::kLines); }
  // Words of x's tile, four places each.
  __device__ SharedSpan<uint32_t> pixels() const {
    return shared_cast<uint32_t>(floats + (P::kConstantsAt + kConstants * C));
  }
  __device__ SharedSpan<float> constants(int which) const { return floats + P::kConstantsAt + which * C; }

  // Where a thread copies: one word of every 32nd row, as in map_rows.
  static constexpr int kOfRow = C / kWord;
  static_assert(kThreads / kOfRow == 32, "rows of a thread lie alike in groups of 16 and among banks");

  // A word of a row: true if there is a pixel, else zeros.
  __device__ bool copy(const T* source, const Strides& strides, int at_place, SharedSpan<T> to) const {
    uint32_t line = static_cast<uint32_t>(at_place < 0 ? 0 : at_place);
    const int at = static_cast<int>(lines().pitch.take(line));
    const bool exists = at_place >= 0 && at < lines().length && static_cast<int>(line) < lines().count;
    if (exists) {
      cp_async<16>(to, source + (static_cast<int64_t>(at) * strides.place[own.branch] +
                                 static_cast<int64_t>(line) * strides.line[own.branch]));
    } else {
      shared_cast<uint4>(to)[0] = uint4{};
    }
    return exists;
  }
  // x's rows are permuted in groups of 16; which of them are pixels is kept in the order of places.
  __device__ void fetch_x(int tile) const {
    if (tile < own.end) {
      const int row = static_cast<int>(threadIdx.x) / kOfRow, word = static_cast<int>(threadIdx.x) % kOfRow;
      const T* const source = static_cast<const T*>(p.image.x) + own.n * p.x.n + word * kWord;
      const int place_of_row = row / kStep * kStep + pixel_of(row % kStep), to = place<C>(row, word);
#pragma unroll
      for (int i = 0; i < kStretch; i += 32) {
        const bool exists = copy(source, p.x, tile * kStretch + kLate + place_of_row + i, x() + (to + i * C));
        if (word == 0) shared_cast<uint8_t>(pixels())[place_of_row + i] = exists ? 1 : 0;
      }
    }
    cp_async_commit();
  }
  __device__ void fetch_grad(int tile) const {
    const int row = static_cast<int>(threadIdx.x) / kOfRow, word = static_cast<int>(threadIdx.x) % kOfRow;
    const T* const source = static_cast<const T*>(p.grad) + own.n * p.grad_strides.n + word * kWord;
    const int to = place<C>(row, word);
#pragma unroll
    for (int i = 0; i <= kStretch; i += 32)
      if (i < kStretch || row < kLate) copy(source, p.grad_strides, tile * kStretch + row + i, grad() + (to + i * C));
    cp_async_commit();
  }

  __device__ void prepare() const {
    const int branch = own.branch;
    LineBlock<T, C>().keep_projection(p.z[branch], memory);
    LineBlock<T, C>().keep_projection(p.theta[branch], memory + C * C);
    for (int i = static_cast<int>(threadIdx.x); i < C * kBand; i += kThreads) {
      float tap[2] = {}, low[2];
      if (i % kBand < kPhaseTaps) {
        for (int even = 0; even < 2; ++even)
          tap[even] = p.taps[branch][(i / kBand * 2 + even) * kPhaseTaps + i % kBand];
      }
      const Fragment high = packed<T>(tap[0], tap[1]);
      T elements[2];
      memcpy(static_cast<void*>(elements), &high, sizeof(high));
      for (int even = 0; even < 2; ++even) low[even] = tap[even] - widen(elements[even]);
      shared_cast<Fragment>(floats + 2 * i)[0] = high;
      shared_cast<Fragment>(floats + 2 * i)[1] = packed<T>(low[0], low[1]);
    }
    for (int i = static_cast<int>(threadIdx.x); i < C; i += kThreads) {
      const float scale = p.scale[branch][i];
      constants(kZBias)[i] = value_or_zero<T>(p.z_bias[branch], i);
      constants(kScale)[i] = scale;
      constants(kShift)[i] = p.shift[branch][i] + value_or_zero<T>(p.theta_bias[branch], i) * scale;
    }
  }

  // Waves of `kTogether` groups of 16 places of the tile, from row `row` on, to the lines.
  __device__ void make_waves(int row) const {
    Products z[kTogether] = {}, theta[kTogether] = {};
    const int of_x = P::kX + row * C + place<C>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const int of_weights = chunk * kStep * C + place<C>(lane % 16, lane / 16);
#pragma unroll kUnroll
    for (int step = 0; step < C / kStep; ++step) {
      Fragment a[4], b[kTogether][4];
#pragma unroll
      for (int k = 0; k < kTogether; ++k) ldmatrix_x4<false>(b[k], memory + (moved<C>(of_x, step) + k * kStep * C));
      ldmatrix_x4<false>(a, memory + moved<C>(of_weights, step));
#pragma unroll
      for (int k = 0; k < kTogether; ++k) multiply<T>(z[k], a, b[k]);
      ldmatrix_x4<false>(a, memory + (moved<C>(of_weights, step) + C * C));
#pragma unroll
      for (int k = 0; k < kTogether; ++k) multiply<T>(theta[k], a, b[k]);
    }
    const int channel = 16 * chunk + 2 * group, pair = channel / 2;
    float2 of[kConstants];
#pragma unroll
    for (int which = 0; which < kConstants; ++which) of[which] = shared_cast<float2>(constants(which) + channel)[0];
    const float scale[4] = {of[kScale].x, of[kScale].x, of[kScale].y, of[kScale].y};
    const float shift[4] = {of[kShift].x, of[kShift].x, of[kShift].y, of[kShift].y};
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const int first = row + k * kStep + 4 * member;
      const uint32_t exists = pixels()[first / 4];
      float u[2][2][4];  // [cos, sin][two places][channel of the pair, place]
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) z[k][j][i] += i < 2 ? of[kZBias].x : of[kZBias].y;
        waves(z[k][j], theta[k][j], scale, shift, u[0][j], u[1][j]);
      }
#pragma unroll
      for (int sine = 0; sine < 2; ++sine) {
        const auto word = [&](int i) {
          return (exists >> 8 * i & 1u) != 0 ? packed<T>(u[sine][i / 2][i % 2], u[sine][i / 2][2 + i % 2])
                                             : Fragment{0};
        };
        shared_cast<uint4>(words() + (word_of(pair, kOutputs + first / 4) + sine * (C / 2 * kWords)))[0] =
            uint4{word(0), word(1), word(2), word(3)};
      }
    }
  }

  // The warp's eight outputs, in the places of their waves.
  __device__ void convolve() const {
    int tap[4];  // in the band, of the four places of a window that this thread has for one output place
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int at = member + 4 * k - group - 1;
      tap[k] = at >= 0 && at < kPhaseTaps ? at : kPhaseTaps;
    }
    const int window = 8 * warp * kWords + word_of(0, lane % 16 * 2 + lane / 16);
    const int next = 8 * warp * kWords + word_of(0, lane % 16 * 2 + lane / 16 + 2);
    const int out[2] = {8 * warp * kWords + word_of(0, kOutputs + group) + member,
                        8 * warp * kWords + word_of(0, kOutputs + 8 + group) + member};
#pragma unroll
    for (int k = 0; k < 4; ++k) tap[k] += 8 * warp * kBand;
#pragma unroll kUnroll
    for (int i = 0; i < 8; ++i) {
      const int line = word_of(i, 0), of_line = line - i * kWords;  // words are moved within 128 bytes
      Fragment a[2][4], high[4], low[4];
      ldmatrix_x4<false>(a[0], shared_cast<T>(words() + ((window ^ of_line) + i * kWords)));
      ldmatrix_x4<false>(a[1], shared_cast<T>(words() + ((next ^ of_line) + i * kWords)));
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint2 both = shared_cast<uint2>(floats)[tap[k] + i * kBand];
        high[k] = both.x;
        low[k] = both.y;
      }
      float d[4] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const Fragment by_high[2] = {high[2 * k], high[2 * k + 1]}, by_low[2] = {low[2 * k], low[2 * k + 1]};
        mma_m16n8k16<T>(d, a[k], by_low);
        mma_m16n8k16<T>(d, a[k], by_high);
      }
      __syncwarp();  // all have read
#pragma unroll
      for (int k = 0; k < 2; ++k) words()[(out[k] ^ of_line) + i * kWords] = packed<T>(d[2 * k], d[2 * k + 1]);
    }
  }
  // The last eight places of the warp's lines become the first.
  __device__ void move_on() const {
    __syncwarp();
    if (lane >= 16) return;
    const int line = 8 * warp + lane / 2;
    shared_cast<uint4>(words() + word_of(line, lane % 2))[0] =
        shared_cast<uint4>(words() + word_of(line, kEnd + lane % 2))[0];
  }

  // x's G: 16 rows and a quarter of the columns of this branch's half, from row `row` of x's tile on.
  __device__ void add_x(int row, float (&d)[C / 32][4]) const {
    const int word = (own.branch * (C / 2) + half * (C / 4)) / kWord;
    const int of_grad = P::kGrad + place<C>(kLate + pixel_of(lane / 16 * 8 + lane % 8), 2 * chunk + lane / 8 % 2);
    const int of_x = P::kX + lane * C;
#pragma unroll 1
    for (; row < kStretch; row += 2 * kStep) {
      Fragment a[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) ldmatrix_x4<true>(a[k], memory + (of_grad + (row + k * kStep) * C));
#pragma unroll
      for (int i = 0; i < C / 32; ++i) {
        Fragment b[4];
        ldmatrix_x4<true>(b, memory + (of_x + place<C>(lane % 8, word + i) - lane % 8 * C + row * C));
        const Fragment first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        mma_m16n8k16<T>(d[i], a[0], first);
        mma_m16n8k16<T>(d[i], a[1], second);
      }
    }
  }
  __device__ void add_outputs(float (&d)[kPairs][2][4]) const {
    const int of_grad = P::kGrad + place<C>(lane / 16 * 8 + lane % 8, 2 * chunk + lane / 8 % 2);
    const int first = half * (C / 2) + lane / 16 * 8 + lane % 8;
#pragma unroll 2
    for (int row = 0; row < kStretch; row += kStep) {
      Fragment a[4], b[4];
      ldmatrix_x4<true>(a, memory + (of_grad + row * C));
      const int word = word_of(first, kOutputs + row / 8 + lane / 8 % 2);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        ldmatrix_x4<false>(b, shared_cast<T>(words() + (word + pair * kStep * kWords)));
        multiply<T>(d[pair], a, b);
      }
    }
  }

  __device__ void run() const {
    prepare();
    float d[kPairs][2][4] = {}, d_x[C / 32][4] = {}, d_bias[2] = {};
    // Before the part's first tile there are its last eight waves, and x's first places if the part is the first.
    fetch_x(own.begin - 1);
#pragma unroll 1
    for (int tile = own.begin - 1; tile < own.end; ++tile) {
      const bool before = tile < own.begin;
      cp_async_wait<0>();
      normalise<T, C, kThreads>(p.image, own.n, kStretch, x());
      __syncthreads();
      if (!before || own.part == 0) fetch_grad(tile);
      constexpr int kOfWarp = kStretch / 2, kAtOnce = kTogether * kStep;
#pragma unroll 1
      for (int row = before ? (half == 0 ? kOfWarp : kOfWarp - kAtOnce) : 0; row < kOfWarp; row += kAtOnce)
        make_waves(half * kOfWarp + row);
      cp_async_wait<0>();
      __syncthreads();
      if (!before) convolve();
      move_on();
      if (!before || own.part == 0) add_x(before ? kStretch - 2 * kStep : 0, d_x);
      __syncthreads();
      fetch_x(tile + 1);
      if (before) continue;
      add_outputs(d);
      if (own.branch == 0) add_columns<T, C>(d_bias, grad(), kStretch, warp);
    }
    cp_async_wait<0>();  // a part without a tile has not waited for its weights
    float* const out = p.partial + ((own.n * 2 + own.branch) * p.parts + own.part) * kPartial<C>;
#pragma unroll
    for (int low = 0; low < 2; ++low) {
      const int row = kStep * chunk + group + 8 * low;
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) {
        const float both[2] = {d[i / 2][i % 2][2 * low], d[i / 2][i % 2][2 * low + 1]};
        store(out + row * C + half * (C / 2) + 8 * i + 2 * member, both);
      }
#pragma unroll
      for (int i = 0; i < C / 32; ++i) {
        const float both[2] = {d_x[i][2 * low], d_x[i][2 * low + 1]};
        store(out + kOfHalf<C> + row * (C / 2) + half * (C / 4) + 8 * i + 2 * member, both);
      }
    }
    if (group == 0 && own.branch == 0) store(out + kOfBias<C> + 8 * warp + 2 * member, d_bias);
  }
};

template <class T, int C>
__global__ void __launch_bounds__(kLineThreads<C>, kBlocks<C>) patm_mixed_gradients(const __grid_constant__ Params p) {
  WAVEMIX_DYNAMIC_SHARED(T, memory);
  const LinePart own(p);
  const Mixed<T, C> mixed{p, own, memory, shared_cast<float>(memory + Places<T, C>::kFloats)};
  mixed.run();
}

// --- Launches --------------------------------------------------------------------------------------------

template <class T, int C>
void run(const PatmArgs& args, const Plane& grad, const float* a, float* d_a, float* d_proj, void* workspace,
         int multiprocessors, void* stream) {
  const Cut cut(args, multiprocessors, kBlocks<C>, kStretch);
  float* const partial = static_cast<float*>(workspace);
  Params p = {line_params(args, grad, a, cut), partial};
  const auto of = static_cast<cudaStream_t>(stream);
  launch_lines<C>("patm_mixed_gradients", patm_mixed_gradients<T, C>, args, p, Places<T, C>::kBytes, of);
  sum_mixed(args, {partial, a, cut.parts, d_a, d_proj}, partial + 2 * cut.rows(args) * kPartial<C>, of);
}

}  // namespace wavemix::whole::mixed

namespace wavemix::whole {

int64_t shared_of_mixed(int64_t c) {
  using namespace mixed;
  const size_t bytes = c == 64   ? Places<__half, 64>::kBytes
                       : c == 96 ? Places<__half, 96>::kBytes
                                 : Places<__half, 128>::kBytes;
  return static_cast<int64_t>(bytes);
}

}  // namespace wavemix::whole

namespace wavemix {

int64_t patm_mixed_gradients_workspace_cuda(const PatmArgs& args, int multiprocessors) {
  whole::check_image(args);
  const whole::Cut cut(args, multiprocessors, args.c == 64 ? whole::mixed::kBlocks<64> : whole::mixed::kBlocks<128>,
                       whole::mixed::kStretch);
  const int64_t of_block = args.c == 64   ? whole::kPartial<64>
                           : args.c == 96 ? whole::kPartial<96>
                                          : whole::kPartial<128>;
  return (2 * cut.rows(args) * of_block + whole::mixed_floats(args)) * static_cast<int64_t>(sizeof(float));
}

void patm_mixed_gradients_cuda(const PatmArgs& args, const Plane& grad, const float* a, float* d_a, float* d_proj,
                               void* workspace, int multiprocessors, void* stream) {
  whole::check_image(args);
  if (args.n * args.h * args.w == 0) return;
  whole::dispatch(args, [&](auto element, auto channels) {
    whole::mixed::run<decltype(element), decltype(channels)::value>(args, grad, a, d_a, d_proj, workspace,
                                                                    multiprocessors, stream);
  });
}

}  // namespace wavemix
