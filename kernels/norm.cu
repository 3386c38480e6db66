#include "kernels/norm.h"
#include "kernels/norm_rows.cuh"

// One kernel for all that norm.h describes: each step of the chain is there or
// not by a null pointer, the same for the whole grid. A row lives in fp32
// registers from the first load to the last store; how it is cut over the
// threads depends on its width alone.
namespace lockstep::kernels {
namespace {

constexpr int kMaxHidden = 16384;
constexpr int kMaxThreads = 512;         // of the 16-byte path
constexpr int kMaxThreadsScalar = 1024;  // fewer registers each

// N elements at a time, kPieces of them a thread: piece j of a thread is the
// (j * blockDim.x + threadIdx.x)th of the row.
template <typename T, int N, int kPieces>
struct Row {
  using Piece = Packed<T, N>;

  __device__ static int Begin(int j) {
    return (j * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * N;
  }

  // Calls fn(j, first element) for each piece within the row.
  template <typename Fn>
  __device__ static void ForEach(int hidden, Fn fn) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      const int at = Begin(j);
      if (at < hidden) fn(j, at);
    }
  }

  // v = norm(v). `weight`: already loaded, or null to load it here.
  __device__ static void Norm(const NormSpec& norm, const Piece* weight, int hidden,
                              float (*scratch)[32], float (&v)[kPieces][N]) {
    const float inverse = 1.0f / static_cast<float>(hidden);
    float mean = 0.0f;
    if (norm.kind == NormKind::kLayer) {
      float sum = 0.0f;
      ForEach(hidden, [&](int j, int) {
#pragma unroll
        for (int e = 0; e < N; ++e) sum += v[j][e];
      });
      mean = BlockSum(sum, scratch[0]) * inverse;
    }
    float squares = 0.0f;
    ForEach(hidden, [&](int j, int) {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        v[j][e] -= mean;
        squares = fmaf(v[j][e], v[j][e], squares);
      }
    });
    const float scale = rsqrtf(BlockSum(squares, scratch[1]) * inverse + norm.eps);
    const float offset = norm.plus_one ? 1.0f : 0.0f;
    ForEach(hidden, [&](int j, int at) {
      float w[N], b[N];
      if (norm.weight == nullptr) {
#pragma unroll
        for (int e = 0; e < N; ++e) w[e] = 1.0f;
      } else {
        Unpack(weight != nullptr ? weight[j]
                                 : LoadConstant<T, N>(static_cast<const T*>(norm.weight) + at),
               w);
#pragma unroll
        for (int e = 0; e < N; ++e) w[e] += offset;
      }
#pragma unroll
      for (int e = 0; e < N; ++e) v[j][e] = v[j][e] * scale * w[e];
      if (norm.bias == nullptr) return;
      Unpack(LoadConstant<T, N>(static_cast<const T*>(norm.bias) + at), b);
#pragma unroll
      for (int e = 0; e < N; ++e) v[j][e] += b[e];
    });
  }

  __device__ static void AddConstant(const void* vector, int hidden, float (&v)[kPieces][N]) {
    if (vector == nullptr) return;
    ForEach(hidden, [&](int j, int at) {
      float f[N];
      Unpack(LoadConstant<T, N>(static_cast<const T*>(vector) + at), f);
#pragma unroll
      for (int e = 0; e < N; ++e) v[j][e] += f[e];
    });
  }

  // Rounds v to T and stores it, where there is somewhere to.
  __device__ static void RoundAndStore(void* to, int64_t row_begin, int hidden,
                                       float (&v)[kPieces][N]) {
    ForEach(hidden, [&](int j, int at) {
      const Piece packed = Pack<T, N>(v[j]);
      Unpack(packed, v[j]);
      if (to != nullptr) Store(static_cast<T*>(to) + row_begin + at, packed);
    });
  }

  __device__ static void Quantize(const QuantizedRows& to, int64_t row, int hidden, float* scratch,
                                  const float (&v)[kPieces][N]) {
    float max = 0.0f;
    ForEach(hidden, [&](int j, int) {
#pragma unroll
      for (int e = 0; e < N; ++e) max = fmaxf(max, fabsf(v[j][e]));
    });
    const RowScale scale(BlockMax(max, scratch));
    if (threadIdx.x == 0) to.scales[row] = scale.scale;
    ForEach(hidden, [&](int j, int at) {
      float f[N];
#pragma unroll
      for (int e = 0; e < N; ++e) f[e] = v[j][e] * scale.inverse;
      Store(static_cast<__nv_fp8_e4m3*>(to.values) + row * hidden + at, Pack<__nv_fp8_e4m3, N>(f));
    });
  }
};

template <typename T, int N, int kPieces, bool kParts>
__global__ void __launch_bounds__(N == 1 ? kMaxThreadsScalar : kMaxThreads)
    RowKernel(const __grid_constant__ RowArgs a) {
  using R = Row<T, N, kPieces>;
  __shared__ float scratch[5][32];
  TriggerDependents();
  // The one constant of every layer is on its way while the kernel before ends.
  Packed<T, N> weight[kPieces] = {};
  if (a.next.weight != nullptr) {
    R::ForEach(a.hidden, [&](int j, int at) {
      weight[j] = LoadConstant<T, N>(static_cast<const T*>(a.next.weight) + at);
    });
  }
  WaitForPrevious();
  const int64_t row = blockIdx.x;
  if (a.slot != nullptr && a.slot[row] < 0) return;
  const int64_t begin = row * a.hidden;

  XPiece<T, N, kParts> x[kPieces];
  Packed<T, N> residual[kPieces] = {};
  R::ForEach(a.hidden, [&](int j, int at) {
    x[j].Load(a, begin + at);
    if (a.residual_in != nullptr) {
      residual[j] = LoadData<T, N>(static_cast<const T*>(a.residual_in) + begin + at);
    }
  });
  float v[kPieces][N];
#pragma unroll
  for (int j = 0; j < kPieces; ++j) x[j].Get(v[j]);
  const float row_factor = RowFactor(a.x_scales, row);
  R::ForEach(a.hidden, [&](int j, int at) { ScaleProduct<T>(a.x_scales, row_factor, at, v[j]); });
  if (a.scale != 1.0f) {
    const float scale = Rounded<T>(a.scale);
    R::ForEach(a.hidden, [&](int j, int) {
#pragma unroll
      for (int e = 0; e < N; ++e) v[j][e] *= scale;
    });
  }
  R::AddConstant(a.bias, a.hidden, v);
  if (a.post.kind != NormKind::kNone) R::Norm(a.post, nullptr, a.hidden, scratch, v);
  if (a.residual_in != nullptr) {
    R::ForEach(a.hidden, [&](int j, int) {
      float f[N];
      Unpack(residual[j], f);
#pragma unroll
      for (int e = 0; e < N; ++e) v[j][e] += f[e];
    });
  }
  if (a.position_table != nullptr) {
    const int64_t at = int64_t{a.position[row]} + a.position_offset;
    R::AddConstant(static_cast<const T*>(a.position_table) + at * a.hidden, a.hidden, v);
  }
  if (a.residual_out != nullptr) {
    R::RoundAndStore(a.norm_is_residual ? nullptr : a.residual_out, begin, a.hidden, v);
  }
  if (a.next.kind != NormKind::kNone) R::Norm(a.next, weight, a.hidden, scratch + 2, v);
  R::RoundAndStore(a.normed, begin, a.hidden, v);
  if (a.norm_is_residual) R::RoundAndStore(a.residual_out, begin, a.hidden, v);
  if (a.quantized.values != nullptr) R::Quantize(a.quantized, row, a.hidden, scratch[4], v);
}

template <typename T, int N, int kPieces>
cudaError_t LaunchRow(const Launch& launch, int num_rows, const RowArgs& args) {
  const int pieces = (args.hidden + N - 1) / N;
  const int threads = ((pieces + kPieces - 1) / kPieces + 31) / 32 * 32;
  const auto kernel =
      args.x_parts != nullptr ? RowKernel<T, N, kPieces, true> : RowKernel<T, N, kPieces, false>;
  return LaunchKernel(launch, kernel, dim3(num_rows), dim3(threads), 0, 1, args);
}

template <typename T>
cudaError_t LaunchRowOf(const Launch& launch, Type type, int num_rows, const RowArgs& a) {
  if (!IsWide(type, a)) return LaunchRow<T, 1, kMaxHidden / kMaxThreadsScalar>(launch, num_rows, a);
  constexpr int kN = 16 / sizeof(T);
  const int pieces = a.hidden / kN;
  if (pieces <= 256) return LaunchRow<T, kN, 1>(launch, num_rows, a);
  if (pieces <= 2 * kMaxThreads) return LaunchRow<T, kN, 2>(launch, num_rows, a);
  if (pieces <= 4 * kMaxThreads) return LaunchRow<T, kN, 4>(launch, num_rows, a);
  if constexpr (sizeof(T) == 4) return LaunchRow<T, kN, 8>(launch, num_rows, a);
  return cudaErrorInvalidValue;
}

cudaError_t LaunchRows(const Launch& launch, Type type, int num_rows, const RowArgs& args) {
  if (num_rows < 0 || args.hidden < 1 || args.hidden > kMaxHidden ||
      (args.x == nullptr && args.x_parts == nullptr) ||
      (args.position_table != nullptr && args.position == nullptr) ||
      !Scalable(args.x_scales, type)) {
    return cudaErrorInvalidValue;
  }
  if (num_rows == 0) return cudaSuccess;
  if (IsPlain(type, args)) return LaunchPlain(launch, type, num_rows, args);
  switch (type) {
    case Type::kF32:
      return LaunchRowOf<float>(launch, type, num_rows, args);
    case Type::kF16:
      return LaunchRowOf<__half>(launch, type, num_rows, args);
    case Type::kBF16:
      return LaunchRowOf<__nv_bfloat16>(launch, type, num_rows, args);
    case Type::kE4M3:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool IsWide(Type type, const RowArgs& a) {
  bool wide = a.hidden * TypeBytes(type) % 16 == 0;
  for (const void* address :
       {a.x, static_cast<const void*>(a.x_parts), static_cast<const void*>(a.x_scales.columns),
        a.bias, a.post.weight, a.post.bias, a.residual_in, a.position_table,
        static_cast<const void*>(a.residual_out), a.next.weight, a.next.bias,
        static_cast<const void*>(a.normed), static_cast<const void*>(a.quantized.values)}) {
    wide = wide && Aligned16(address);
  }
  return wide;
}

cudaError_t Norm(const Launch& launch, const NormArgs& args) {
  RowArgs row;
  row.hidden = args.hidden;
  row.slot = args.slot;
  row.x = args.x;
  row.next = args.norm;
  row.normed = args.normed;
  row.quantized = args.quantized;
  return LaunchRows(launch, args.type, args.num_rows, row);
}

cudaError_t AfterEmbed(const Launch& launch, const AfterEmbedArgs& args) {
  RowArgs row;
  row.hidden = args.hidden;
  row.slot = args.rows.slot;
  row.x = args.x;
  row.scale = args.scale;
  row.position_table = args.position_table;
  row.position = args.rows.position;
  row.position_offset = args.position_offset;
  row.residual_out = args.residual;
  row.next = args.norm;
  row.normed = args.normed;
  row.quantized = args.quantized;
  return LaunchRows(launch, args.type, args.num_rows, row);
}

cudaError_t ReduceTail(const Launch& launch, const ReduceTailArgs& args) {
  RowArgs row;
  row.hidden = args.hidden;
  row.slot = args.slot;
  row.x = args.x;
  row.x_parts = args.x_parts;
  row.part_stride = int64_t{args.num_rows} * args.hidden;
  row.x_scales = args.x_scales;
  row.bias = args.bias;
  row.post = args.post;
  row.residual_in = args.residual_in;
  row.residual_out = args.residual_out;
  row.next = args.next;
  row.norm_is_residual = args.norm_is_residual;
  row.normed = args.normed;
  row.quantized = args.quantized;
  return LaunchRows(launch, args.type, args.num_rows, row);
}

}  // namespace lockstep::kernels
