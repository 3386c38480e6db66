#include "kernels/qkv_finish.h"
#include "kernels/vector.cuh"

// A head of a row is a unit: a group of 2^k lanes within a warp holds its two
// halves in registers, N elements of each at a time, so that a lane has both
// members of every pair it rotates and the norm is a few shuffles. Where rows are
// many, a group takes kHeads units in turn: all are requested before the first is
// used, and one read of the rotary table serves them.
namespace lockstep::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxHeadDim = 256;
constexpr int kManyRows = 128;  // fill the device with a few units a group

struct Shape {
  int lanes = 0;   // of a group: a power of two, at most 32
  int half = 0;    // head_dim / 2
  int units = 0;   // of a row: heads + 2 * kv_heads
  int groups = 0;  // of a row
  float k_inverse = 1.0f, v_inverse = 1.0f;
};

template <typename T, int N>
__device__ __forceinline__ void AddConstant(const T* at, float (&v)[N]) {
  float f[N];
  Unpack(LoadConstant<T, N>(at), f);
#pragma unroll
  for (int e = 0; e < N; ++e) v[e] += f[e];
}

template <typename T, int N>
__device__ __forceinline__ void Scale(const T* weight, float scale, float offset, float (&v)[N]) {
  float w[N];
  Unpack(LoadConstant<T, N>(weight), w);
#pragma unroll
  for (int e = 0; e < N; ++e) v[e] = v[e] * scale * (w[e] + offset);
}

// Cosines and sines of N pairs, next to each other.
template <int N>
__device__ __forceinline__ void LoadTurns(const float2* at, float2 (&turns)[N]) {
  if constexpr (N == 1) {
    turns[0] = __ldg(at);
  } else {
#pragma unroll
    for (int e = 0; e < N; e += 2) {
      const float4 two = __ldg(reinterpret_cast<const float4*>(at + e));
      turns[e] = make_float2(two.x, two.y);
      turns[e + 1] = make_float2(two.z, two.w);
    }
  }
}

// Piece j of a lane begins at element (j * lanes + lane) * N of its half.
template <typename T, typename Kv, int N, int kPieces, int kHeads>
__global__ void __launch_bounds__(kThreads)
    QkvFinishKernel(const __grid_constant__ QkvFinishArgs a, const __grid_constant__ Shape s) {
  TriggerDependents();
  const int thread = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int lane = thread % s.lanes, index = thread / s.lanes;
  const int row = index / s.groups, first_unit = index % s.groups * kHeads;
  T* const x = static_cast<T*>(a.qkv) + static_cast<int64_t>(row) * a.qkv_stride;
  WaitForPrevious();
  // Lanes without work stay: the shuffles below are the whole warp's. Padding rows
  // are read, so that reading need not wait for their slot.
  const bool exists = row < a.num_rows;
  const int slot = exists ? a.rows.slot[row] : -1;
  const int position = exists ? a.rows.position[row] : 0;
  const float row_factor = exists ? RowFactor(a.scales, row) : 1.0f;
  const auto place = [&](int j) { return (j * s.lanes + lane) * N; };
  const auto in_head = [&](int j, int i) {
    return exists && first_unit + i < s.units && place(j) < s.half;
  };
  Packed<T, N> low_raw[kHeads][kPieces], high_raw[kHeads][kPieces];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      if (!in_head(j, i)) continue;
      const T* at = x + (first_unit + i) * a.kv.head_dim + place(j);
      low_raw[i][j] = LoadData<T, N>(at);
      high_raw[i][j] = LoadData<T, N>(at + s.half);
    }
  }
  float2 turns[kPieces][N];
  int64_t cached_position = 0;  // in units of head_dim, of KV head 0
  if (slot >= 0) {
    if (a.rotary != nullptr) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        if (place(j) >= s.half) continue;
        LoadTurns<N>(a.rotary + static_cast<int64_t>(position) * s.half + place(j), turns[j]);
      }
    }
    const int block = a.rows.block_table[static_cast<int64_t>(slot) * a.rows.table_stride +
                                         position / a.kv.block_size];
    cached_position =
        static_cast<int64_t>(block) * a.kv.kv_heads * a.kv.block_size + position % a.kv.block_size;
  }

#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int unit = first_unit + i;
    const bool is_q = unit < a.heads;
    const bool is_v = unit >= a.heads + a.kv.kv_heads;
    float low[kPieces][N], high[kPieces][N];
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      if (!in_head(j, i)) continue;
      Unpack(low_raw[i][j], low[j]);
      Unpack(high_raw[i][j], high[j]);
      const int column = unit * a.kv.head_dim + place(j);
      ScaleProduct<T>(a.scales, row_factor, column, low[j]);
      ScaleProduct<T>(a.scales, row_factor, column + s.half, high[j]);
      if (a.bias != nullptr) {
        const T* bias = static_cast<const T*>(a.bias) + unit * a.kv.head_dim + place(j);
        AddConstant(bias, low[j]);
        AddConstant(bias + s.half, high[j]);
      }
#pragma unroll
      for (int e = 0; e < N; ++e) {
        squares = fmaf(low[j][e], low[j][e], squares);
        squares = fmaf(high[j][e], high[j][e], squares);
      }
    }
    if (a.q_norm != nullptr) {  // the same for every lane of the grid
      for (int offset = s.lanes / 2; offset > 0; offset /= 2) {
        squares += __shfl_xor_sync(~0u, squares, offset);
      }
      const float scale = rsqrtf(squares / static_cast<float>(a.kv.head_dim) + a.norm_eps);
      const float offset = a.norm_plus_one ? 1.0f : 0.0f;
      const T* weight = static_cast<const T*>(is_q ? a.q_norm : a.k_norm);
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        if (is_v || !in_head(j, i)) continue;
        Scale(weight + place(j), scale, offset, low[j]);
        Scale(weight + s.half + place(j), scale, offset, high[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      if (slot < 0 || !in_head(j, i)) continue;
      if (a.rotary != nullptr && !is_v) {
#pragma unroll
        for (int e = 0; e < N; ++e) {
          const float p = low[j][e], q = high[j][e];
          low[j][e] = p * turns[j][e].x - q * turns[j][e].y;
          high[j][e] = q * turns[j][e].x + p * turns[j][e].y;
        }
      }
      if (is_q) {
        T* const at = x + unit * a.kv.head_dim + place(j);
        Store(at, Pack<T, N>(low[j]));
        Store(at + s.half, Pack<T, N>(high[j]));
        continue;
      }
      if constexpr (sizeof(Kv) == 1) {
        const float inverse = is_v ? s.v_inverse : s.k_inverse;
#pragma unroll
        for (int e = 0; e < N; ++e) {
          low[j][e] *= inverse;
          high[j][e] *= inverse;
        }
      }
      const int head = unit - a.heads - (is_v ? a.kv.kv_heads : 0);
      Kv* const at = static_cast<Kv*>(is_v ? a.kv.v : a.kv.k) +
                     (cached_position + head * a.kv.block_size) * a.kv.head_dim + place(j);
      Store(at, Pack<Kv, N>(low[j]));
      Store(at + s.half, Pack<Kv, N>(high[j]));
    }
  }
}

template <typename T, typename Kv, int N, int kPieces, int kHeads>
cudaError_t LaunchFinish(const Launch& launch, const QkvFinishArgs& a) {
  Shape s;
  s.half = a.kv.head_dim / 2;
  s.units = a.heads + 2 * a.kv.kv_heads;
  s.groups = (s.units + kHeads - 1) / kHeads;
  s.lanes = 1;
  while (s.lanes < 32 && s.lanes * N < s.half) s.lanes *= 2;
  s.k_inverse = 1.0f / a.kv.k_scale;
  s.v_inverse = 1.0f / a.kv.v_scale;
  const int64_t threads = int64_t{a.num_rows} * s.groups * s.lanes;
  if (threads > INT32_MAX - kThreads) return cudaErrorInvalidValue;
  return LaunchKernel(launch, QkvFinishKernel<T, Kv, N, kPieces, kHeads>,
                      dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads)),
                      dim3(kThreads), 0, 1, a, s);
}

template <typename T, typename Kv>
cudaError_t FinishOf(const Launch& launch, const QkvFinishArgs& a) {
  constexpr int kN = 16 / sizeof(T);
  bool wide = a.kv.head_dim / 2 % kN == 0 && a.qkv_stride % kN == 0;
  for (const void* address :
       {static_cast<const void*>(a.qkv), static_cast<const void*>(a.scales.columns), a.bias,
        a.q_norm, a.k_norm, static_cast<const void*>(a.rotary), static_cast<const void*>(a.kv.k),
        static_cast<const void*>(a.kv.v)}) {
    wide = wide && Aligned16(address);
  }
  if (!wide) return LaunchFinish<T, Kv, 1, kMaxHeadDim / 2 / 32, 1>(launch, a);
  if (a.num_rows < kManyRows) return LaunchFinish<T, Kv, kN, 1, 1>(launch, a);
  return LaunchFinish<T, Kv, kN, 1, 4>(launch, a);
}

template <typename T>
cudaError_t FinishWith(const Launch& launch, const QkvFinishArgs& a) {
  if (a.kv.type == Type::kE4M3) return FinishOf<T, __nv_fp8_e4m3>(launch, a);
  if (a.kv.type == a.type) return FinishOf<T, T>(launch, a);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t QkvFinish(const Launch& launch, const QkvFinishArgs& a) {
  const int head_dim = a.kv.head_dim;
  if (a.num_rows < 0 || a.heads < 0 || a.kv.kv_heads < 0 || a.kv.block_size < 1 || head_dim < 2 ||
      head_dim > kMaxHeadDim || head_dim % 2 != 0 || a.heads + a.kv.kv_heads == 0 ||
      a.qkv_stride < (a.heads + 2 * a.kv.kv_heads) * head_dim ||
      (a.q_norm == nullptr) != (a.k_norm == nullptr) || !Scalable(a.scales, a.type)) {
    return cudaErrorInvalidValue;
  }
  if (a.num_rows == 0) return cudaSuccess;
  switch (a.type) {
    case Type::kF32:
      return FinishWith<float>(launch, a);
    case Type::kF16:
      return FinishWith<__half>(launch, a);
    case Type::kBF16:
      return FinishWith<__nv_bfloat16>(launch, a);
    case Type::kE4M3:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace lockstep::kernels
