#include "kernels/qkv_finish.h"
#include "kernels/vector.cuh"

// A head of a row is a unit: a group of 2^k lanes within a warp holds its two
// halves in registers, N elements of each at a time, so that a lane has both
// members of every pair it rotates and the norm is a few shuffles.
namespace lockstep::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxHeadDim = 256;

struct Shape {
  int lanes = 0;  // of a group: a power of two, at most 32
  int half = 0;   // head_dim / 2
  int units = 0;  // of a row: heads + 2 * kv_heads
  float k_inverse = 1.0f, v_inverse = 1.0f;
};

// One half or the other: piece j of a lane begins at element (j * lanes + lane) * N.
template <typename T, typename Kv, int N, int kPieces>
__global__ void __launch_bounds__(kThreads)
    QkvFinishKernel(const __grid_constant__ QkvFinishArgs a, const __grid_constant__ Shape s) {
  TriggerDependents();
  const int thread = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  const int lane = thread % s.lanes;
  const int64_t index = thread / s.lanes;
  const int row = static_cast<int>(index / s.units), unit = static_cast<int>(index % s.units);
  WaitForPrevious();
  // Lanes without work stay: the shuffles below are the whole warp's.
  const int slot = row < a.num_rows ? a.rows.slot[row] : -1;
  const int position = slot >= 0 ? a.rows.position[row] : 0;
  const bool is_q = unit < a.heads;
  const bool is_v = unit >= a.heads + a.kv.kv_heads;
  const int end = slot >= 0 ? s.half : 0;
  const int head_begin = unit * a.kv.head_dim;
  T* const x = static_cast<T*>(a.qkv) + static_cast<int64_t>(row) * a.qkv_stride + head_begin;

  Kv* cache = nullptr;
  if (slot >= 0 && !is_q) {
    const int block = a.rows.block_table[static_cast<int64_t>(slot) * a.rows.table_stride +
                                         position / a.kv.block_size];
    const int head = unit - a.heads - (is_v ? a.kv.kv_heads : 0);
    const int64_t at = (static_cast<int64_t>(block) * a.kv.kv_heads + head) * a.kv.block_size +
                       position % a.kv.block_size;
    cache = static_cast<Kv*>(is_v ? a.kv.v : a.kv.k) + at * a.kv.head_dim;
  }

  float low[kPieces][N], high[kPieces][N];
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int at = (j * s.lanes + lane) * N;
    if (at >= end) continue;
    Unpack(LoadData<T, N>(x + at), low[j]);
    Unpack(LoadData<T, N>(x + s.half + at), high[j]);
    if (a.bias != nullptr) {
      const T* bias = static_cast<const T*>(a.bias) + head_begin + at;
      float b[N], c[N];
      Unpack(LoadConstant<T, N>(bias), b);
      Unpack(LoadConstant<T, N>(bias + s.half), c);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        low[j][e] += b[e];
        high[j][e] += c[e];
      }
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
    if (!is_v) {
      const float scale = 1.0f / sqrtf(squares / static_cast<float>(a.kv.head_dim) + a.norm_eps);
      const float offset = a.norm_plus_one ? 1.0f : 0.0f;
      const T* weight = static_cast<const T*>(is_q ? a.q_norm : a.k_norm);
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int at = (j * s.lanes + lane) * N;
        if (at >= end) continue;
        float w[N], u[N];
        Unpack(LoadConstant<T, N>(weight + at), w);
        Unpack(LoadConstant<T, N>(weight + s.half + at), u);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          low[j][e] = low[j][e] * scale * (w[e] + offset);
          high[j][e] = high[j][e] * scale * (u[e] + offset);
        }
      }
    }
  }

#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int at = (j * s.lanes + lane) * N;
    if (at >= end) continue;
    if (a.rotary != nullptr && !is_v) {
      const float2* turn = a.rotary + static_cast<int64_t>(position) * s.half + at;
#pragma unroll
      for (int e = 0; e < N; e += 2) {
        float2 t[2];
        if constexpr (N > 1) {
          const float4 both = __ldg(reinterpret_cast<const float4*>(turn + e));
          t[0] = make_float2(both.x, both.y);
          t[1] = make_float2(both.z, both.w);
        } else {
          t[0] = __ldg(turn);
        }
#pragma unroll
        for (int i = e; i < N && i < e + 2; ++i) {
          const float p = low[j][i], q = high[j][i];
          const float2 c = t[i - e];
          low[j][i] = p * c.x - q * c.y;
          high[j][i] = q * c.x + p * c.y;
        }
      }
    }
    if (is_q) {
      Store(x + at, Pack<T, N>(low[j]));
      Store(x + s.half + at, Pack<T, N>(high[j]));
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
    Store(cache + at, Pack<Kv, N>(low[j]));
    Store(cache + s.half + at, Pack<Kv, N>(high[j]));
  }
}

template <typename T, typename Kv, int N, int kPieces>
cudaError_t LaunchFinish(const Launch& launch, const QkvFinishArgs& a) {
  Shape s;
  s.half = a.kv.head_dim / 2;
  s.units = a.heads + 2 * a.kv.kv_heads;
  s.lanes = 1;
  while (s.lanes < 32 && s.lanes * N < s.half) s.lanes *= 2;
  s.k_inverse = 1.0f / a.kv.k_scale;
  s.v_inverse = 1.0f / a.kv.v_scale;
  const int64_t threads = int64_t{a.num_rows} * s.units * s.lanes;
  if (threads > INT32_MAX - kThreads) return cudaErrorInvalidValue;
  return LaunchKernel(launch, QkvFinishKernel<T, Kv, N, kPieces>,
                      dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads)),
                      dim3(kThreads), 0, 1, a, s);
}

template <typename T, typename Kv>
cudaError_t FinishOf(const Launch& launch, const QkvFinishArgs& a) {
  constexpr int kN = 16 / sizeof(T);
  bool wide = a.kv.head_dim / 2 % kN == 0 && a.qkv_stride % kN == 0;
  for (const void* address : {static_cast<const void*>(a.qkv), a.bias, a.q_norm, a.k_norm,
                              static_cast<const void*>(a.rotary), static_cast<const void*>(a.kv.k),
                              static_cast<const void*>(a.kv.v)}) {
    wide = wide && Aligned16(address);
  }
  if (wide) return LaunchFinish<T, Kv, kN, 1>(launch, a);
  return LaunchFinish<T, Kv, 1, kMaxHeadDim / 2 / 32>(launch, a);
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
      (a.q_norm == nullptr) != (a.k_norm == nullptr)) {
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
