// The gradients of PATM's branch weights and output projection, from x and the output's gradient.
//
// Each branch is made again along its lines, waves one tile ahead of what they convolve to. With d = proj^T grad the
// branch weights' gradient is the sum over an image of d times a branch; proj's is the sum over all pixels of grad
// times what was mixed, to which each branch adds its own part: no block has to know both.
#include "cuda/patm/whole_lines.cuh"

namespace wavemix::whole {
namespace {

// Where the third branch's matrix does not fit beside the others, its fragments come from the caches.
template <int C>
constexpr bool kHeld = C < 128;
template <int C>
constexpr int kBlocks = C == 64 ? 2 : 1;

enum Constant { kZBias, kScale, kShift, kWeight, kThirdWeight, kThirdBias, kConstants };  // each C

template <class T, int C>
struct Places {
  static constexpr int kMatrices = kHeld<C> ? 4 : 3;  // z, theta, proj's columns, z_c
  // In elements.
  static constexpr int kX = kMatrices * C * C, kGrad = kX + 3 * kPlaces * C, kMixed = kGrad + 3 * kPlaces * C;
  static constexpr int kWaves = kMixed + kPlaces * C, kFloats = kWaves + 2 * C * kLine;
  // In floats.
  static constexpr int kConstantsAt = 16 * C;
  static constexpr size_t kBytes = size_t{2} * kFloats + size_t{4} * (kConstantsAt + kConstants * C);
};

struct Params : LineParams {
  const void *z_c, *z_c_bias;
  float *d_a, *d_proj;  // partial: (3, n, parts, C), and (n, 2, parts, C C + C)
};

template <class T, int C>
__global__ void __launch_bounds__(kLineThreads<C>, kBlocks<C>) patm_mixed_gradients(const __grid_constant__ Params p) {
  WAVEMIX_DYNAMIC_SHARED(T, memory);
  using P = Places<T, C>;
  constexpr int kThreads = kLineThreads<C>, kTile = kPlaces * C, kPairs = C / 32;
  using Products = typename LineBlock<T, C>::Products;
  const LineBlock<T, C> block;
  const LinePart own(p);
  const int64_t n = own.n;
  const int branch = own.branch, part = own.part, begin = own.begin, end = own.end;
  const Lines& lines = p.lines[branch];
  const auto is_tile = [&](int tile) { return tile >= 0 && tile < lines.tiles; };
  const auto x_tile = [&](int slot) { return memory + (P::kX + slot * kTile); };
  const auto grad_tile = [&](int slot) { return memory + (P::kGrad + slot * kTile); };
  const SharedSpan<T> mixed = memory + P::kMixed;
  const SharedSpan<uint32_t> waves_at = shared_cast<uint32_t>(memory + P::kWaves);
  const auto line = [&](int half) { return waves_at + (half * (C / 2) + block.pair()) * kLine; };
  const SharedSpan<float> floats = shared_cast<float>(memory + P::kFloats);
  const auto constants = [&](int which) { return floats + (P::kConstantsAt + which * C); };
  const T* const x = static_cast<const T*>(p.image.x) + n * p.x.n;
  const T* const grad = static_cast<const T*>(p.grad) + n * p.grad_strides.n;
  // Copies for the step of tile `step`: x of the next tile, the gradient of this one, into its `slot` of three.
  const auto fetch_for = [&](int step, int slot) {
    if (step < end && is_tile(step + 1)) block.fetch(x, p.x, branch, lines, step + 1, x_tile(after(slot)));
    if (step >= begin && step < end) block.fetch(grad, p.grad_strides, branch, lines, step, grad_tile(slot));
    cp_async_commit();
  };
  block.keep_projection(p.z[branch], memory);
  block.keep_projection(p.theta[branch], memory + C * C);
  block.keep_columns(p.proj, memory + 2 * C * C);
  if constexpr (kHeld<C>) {
    if (branch == 0) {
      for (int i = static_cast<int>(threadIdx.x); i < C * (C / kWord); i += kThreads) {
        const int row = i / (C / kWord), word = i % (C / kWord);
        cp_async<16>(memory + (3 * C * C + place<C>(row, word)),
                     static_cast<const T*>(p.z_c) + output_of_row<C>(row) * C + word * kWord);
      }
    }
  }
  fetch_for(begin - 2, 0);
  fetch_for(begin - 1, 1);
  block.keep_taps(p.taps[branch], floats);
  for (int i = static_cast<int>(threadIdx.x); i < C; i += kThreads) {
    const float scale = p.scale[branch][i];
    constants(kZBias)[i] = value_or_zero<T>(p.z_bias[branch], i);
    constants(kScale)[i] = scale;
    constants(kShift)[i] = p.shift[branch][i] + value_or_zero<T>(p.theta_bias[branch], i) * scale;
    constants(kWeight)[i] = p.a[(branch * p.n + n) * C + i];
    constants(kThirdWeight)[i] = p.a[(2 * p.n + n) * C + i];
    constants(kThirdBias)[i] = value_or_zero<T>(p.z_c_bias, i);
  }
  const float path = p.path == nullptr ? 1.0f : p.path[n];
  const int half_of_columns = block.warp / LineBlock<T, C>::kChunks;
  float d_proj[kPairs][2][4] = {}, d_bias[2] = {}, d_a[4] = {};  // of the branch and of the third one, two outputs each
  int slot = 0;
#pragma unroll 1
  for (int tile = begin - 2; tile < end; ++tile, slot = after(slot)) {
    const int next = tile + 1, slot_of_next = after(slot);
    cp_async_wait<1>();
    if (is_tile(next)) normalise<T, C, kThreads>(p.image, n, kPlaces, x_tile(slot_of_next));
    __syncthreads();
    {
      Products z = {}, theta = {};
      const int at = block.at(slot_of_next);
      uint32_t words[2][4] = {};
      if (is_tile(next)) {
        block.multiply_places(x_tile(slot_of_next), memory, z, theta);
        const Four four(lines, next, block.first + 4 * block.member, 0, 0);
        float of[3][2];
#pragma unroll
        for (int which = 0; which < 3; ++which) {
          const float2 pair = shared_cast<float2>(constants(kZBias + which) + block.channel())[0];
          of[which][0] = pair.x;
          of[which][1] = pair.y;
        }
        float u[2][2][4];  // [channel of the pair][cos, sin][place]
#pragma unroll
        for (int even = 0; even < 2; ++even) {
          const float scale[4] = {of[1][even], of[1][even], of[1][even], of[1][even]};
          const float shift[4] = {of[2][even], of[2][even], of[2][even], of[2][even]};
          const float amplitude[4] = {z[0][2 * even] + of[0][even], z[0][2 * even + 1] + of[0][even],
                                      z[1][2 * even] + of[0][even], z[1][2 * even + 1] + of[0][even]};
          const float phase[4] = {theta[0][2 * even], theta[0][2 * even + 1], theta[1][2 * even],
                                  theta[1][2 * even + 1]};
          waves<T>(amplitude, phase, scale, shift, u[even][0], u[even][1]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (four.exists(i)) words[half][i] = packed<T>(u[0][half][i], u[1][half][i]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
        shared_cast<uint4>(line(half) + at)[0] = uint4{words[half][0], words[half][1], words[half][2], words[half][3]};
    }
    Products d = {}, third = {};
    if (tile >= begin) {
      block.multiply_places(grad_tile(slot), memory + 2 * C * C, d);
      if (branch == 0) {
        if constexpr (kHeld<C>) {
          block.multiply_places(x_tile(slot), memory + 3 * C * C, third);
        } else {
#pragma unroll 2
          for (int step = 0; step < C / kStep; ++step) {
            Fragment a[4], b[4];
            load_columns<C>(b, x_tile(slot), block.first, step);
            block.from_caches(p.z_c, [](int row) { return output_of_row<C>(row); }, step, a);
            multiply<T>(third, a, b);
          }
        }
      }
    }
    __syncthreads();
    fetch_for(tile + 2, after(slot_of_next));
    if (tile < begin) continue;
    float sums[2][4];  // what this branch adds to the mixed, [output of the pair][place]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 words[3];
      block.around(line(half), slot, words);
      float near[2][3 * kMargin];
      block.unpack(words, near);
      float convolved[4] = {};
#pragma unroll
      for (int even = 0; even < 2; ++even) {
        float tap[8];
        block.load_taps(floats, half, even, tap);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int k = 0; k < kPhaseTaps; ++k) convolved[i] += near[even][kMargin - kReach + i + k] * tap[k];
        }
      }
      const int output = block.pair() + half * (C / 2);
      const float weight = constants(kWeight)[output], third_bias = constants(kThirdBias)[output];
      const float third_weight = branch == 0 ? constants(kThirdWeight)[output] : 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float of_third = third[i / 2][2 * half + i % 2] + third_bias, by = d[i / 2][2 * half + i % 2];
        d_a[half] += by * convolved[i];
        d_a[2 + half] += by * of_third;
        sums[half][i] = convolved[i] * weight + of_third * third_weight;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      shared_cast<Fragment>(
          mixed + place<C>(block.first + i / 2 * 8 + 2 * block.member + i % 2, 2 * block.chunk + block.group / 4) +
          block.group % 4 * 2)[0] = packed<T>(sums[0][i], sums[1][i]);
    __syncthreads();
#pragma unroll
    for (int row = 0; row < kPlaces; row += kStep) {
      Fragment a[4];
      load_rows_transposed<C>(a, grad_tile(slot), row, block.chunk);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        Fragment b[4];
        load_columns_transposed<C>(b, mixed, row, half_of_columns * kPairs + pair);
        multiply<T>(d_proj[pair], a, b);
      }
    }
    if (branch == 0) add_columns<T, C>(d_bias, grad_tile(slot), kPlaces, block.warp);
  }
  cp_async_wait<0>();  // a part without a tile has not waited for its weights
  float* const out = p.d_proj + ((n * 2 + branch) * p.parts + part) * (C * C + C);
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int row = 16 * block.chunk + block.group + k / 2 % 2 * 8;
      const int column = (half_of_columns * kPairs + pair) * kStep + k / 4 * 8 + 2 * block.member + k % 2;
      out[row * C + output_at<C>(column)] = path * d_proj[pair][k / 4][k % 4];
    }
  }
  if (block.group == 0) {
    const float bias[2] = {path * d_bias[0], path * d_bias[1]};
    store(out + C * C + 8 * block.warp + 2 * block.member, bias);
  }
  block.add_up(d_a, shared_cast<float>(waves_at), [&](int k, float sum) {  // by pair
    const int which = k < 2 ? branch : 2;
    if (k < 2 || branch == 0)
      p.d_a[((which * p.n + n) * p.parts + part) * C + block.pair() + k % 2 * (C / 2)] = path * sum;
  });
}

// --- Launches --------------------------------------------------------------------------------------------

struct Workspace {
  int64_t d_a, d_proj, floats;  // offsets, and all

  Workspace(const PatmArgs& args, const Cut& cut) {
    d_a = 0;
    d_proj = 3 * cut.rows(args) * args.c;
    floats = d_proj + 2 * cut.rows(args) * (args.c * args.c + args.c);
  }
};

template <class T, int C>
void run(const PatmArgs& args, const Plane& grad, const float* a, float* d_a, float* d_proj, void* workspace,
         int multiprocessors, void* stream) {
  const Cut cut(args, multiprocessors, kBlocks<C>);
  const Workspace places(args, cut);
  float* const partial = static_cast<float*>(workspace);
  Params p = {line_params(args, grad, a, cut), args.z_c, args.z_c_bias, partial + places.d_a, partial + places.d_proj};
  const auto of = static_cast<cudaStream_t>(stream);
  launch_lines<C>("patm_mixed_gradients", patm_mixed_gradients<T, C>, args, p, Places<T, C>::kBytes, of);
  sum_rows({p.d_a, cut.parts, C, 3 * args.n, d_a},
           {p.d_proj, static_cast<int>(2 * cut.rows(args)), C * C + C, 1, d_proj}, of);
}

}  // namespace
}  // namespace wavemix::whole

namespace wavemix {

int64_t patm_mixed_gradients_workspace_cuda(const PatmArgs& args, int multiprocessors) {
  whole::check_image(args);
  const whole::Cut cut(args, multiprocessors, args.c == 64 ? whole::kBlocks<64> : whole::kBlocks<128>);
  return whole::Workspace(args, cut).floats * static_cast<int64_t>(sizeof(float));
}

void patm_mixed_gradients_cuda(const PatmArgs& args, const Plane& grad, const float* a, float* d_a, float* d_proj,
                               void* workspace, int multiprocessors, void* stream) {
  whole::check_image(args);
  if (args.n * args.h * args.w == 0) return;
  whole::dispatch(args, [&](auto element, auto channels) {
    whole::run<decltype(element), decltype(channels)::value>(args, grad, a, d_a, d_proj, workspace, multiprocessors,
                                                             stream);
  });
}

}  // namespace wavemix
