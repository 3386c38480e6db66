#include <algorithm>
#include <cmath>

#include "kernels/attention_plain.h"
#include "kernels/device.cuh"
#include "kernels/vector.cuh"

namespace lockstep::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 64;  // positions between two updates of the running maximum
constexpr int kMaxHeadDim = 512;
constexpr int kMaxGroup = 32;

struct Row {
  int slot = -1;
  int position = 0;
  int index = 0;  // in q and out
};

__device__ Row FindRow(const PlainAttentionArgs& a) {
  Row row;
  const int i = blockIdx.x;
  if (a.spans == nullptr) {
    row.slot = a.rows.slot[i];
    row.position = row.slot >= 0 ? a.rows.position[i] : 0;
    row.index = i;
    return row;
  }
  const PrefillSpan span = a.spans[blockIdx.z];
  if (i < span.count) row = {span.slot, span.begin + i, span.first_row + i};
  return row;
}

// Shared memory, floats: q [group][head_dim], acc [group][head_dim],
// p [group][kChunk], correction [group], sum [group].
template <typename T, typename KV>
__global__ void __launch_bounds__(kThreads) PlainKernel(const PlainAttentionArgs a) {
  TriggerDependents();
  WaitForPrevious();
  const Row row = FindRow(a);
  if (row.slot < 0) return;

  const int head_dim = a.kv.head_dim, block_size = a.kv.block_size;
  const int kv_head = blockIdx.y, group = a.heads / a.kv.kv_heads;
  const int elements = group * head_dim;
  extern __shared__ float shared[];
  float* q = shared;
  float* acc = q + elements;
  float* p = acc + elements;
  float* correction = p + group * kChunk;
  float* sum = correction + group;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* q_row = static_cast<const T*>(a.q) + static_cast<int64_t>(row.index) * a.q_stride +
                   kv_head * elements;
  const float q_scale = a.scale * a.kv.k_scale;
  for (int e = threadIdx.x; e < elements; e += kThreads) {
    q[e] = ToFloat(q_row[e]) * q_scale;
    acc[e] = 0.0f;
  }
  const int32_t* table = a.rows.block_table + static_cast<int64_t>(row.slot) * a.rows.table_stride;
  const auto offset_of = [&](int position) {
    const int64_t block = table[position / block_size];
    return ((block * a.kv.kv_heads + kv_head) * block_size + position % block_size) * head_dim;
  };
  const KV* k_cache = static_cast<const KV*>(a.kv.k);
  const KV* v_cache = static_cast<const KV*>(a.kv.v);
  const int end = row.position + 1;
  const int begin = a.window > 0 ? max(0, end - a.window) : 0;

  // Warp w keeps the running maximum and sum of heads w, w + kWarps, ...
  float running_max[kMaxGroup / kWarps], running_sum[kMaxGroup / kWarps];
#pragma unroll
  for (int i = 0; i < kMaxGroup / kWarps; ++i) {
    running_max[i] = -INFINITY;
    running_sum[i] = 0.0f;
  }
  __syncthreads();
  for (int first = begin; first < end; first += kChunk) {
    const int count = min(kChunk, end - first);
    for (int t = warp; t < count; t += kWarps) {
      const KV* k = k_cache + offset_of(first + t);
      for (int g = 0; g < group; ++g) {
        float dot = 0.0f;
        for (int d = lane; d < head_dim; d += 32) dot += q[g * head_dim + d] * ToFloat(k[d]);
        dot = WarpSum(dot);
        if (lane == 0) p[g * kChunk + t] = dot;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kMaxGroup / kWarps; ++i) {
      const int g = warp + i * kWarps;
      if (g >= group) break;
      float* row_p = p + g * kChunk;
      float top = running_max[i];
      for (int t = lane; t < count; t += 32) top = fmaxf(top, row_p[t]);
      top = WarpMax(top);
      const float shrink = expf(running_max[i] - top);
      float total = 0.0f;
      for (int t = lane; t < count; t += 32) {
        const float value = expf(row_p[t] - top);
        row_p[t] = value;
        total += value;
      }
      running_max[i] = top;
      running_sum[i] = running_sum[i] * shrink + WarpSum(total);
      if (lane == 0) {
        correction[g] = shrink;
        sum[g] = running_sum[i];
      }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < elements; e += kThreads) {
      const int g = e / head_dim, d = e % head_dim;
      float value = acc[e] * correction[g];
#pragma unroll 4
      for (int t = 0; t < count; ++t) {
        value += p[g * kChunk + t] * ToFloat(v_cache[offset_of(first + t) + d]);
      }
      acc[e] = value;
    }
    __syncthreads();
  }
  T* out =
      static_cast<T*>(a.out) + static_cast<int64_t>(row.index) * a.out_stride + kv_head * elements;
  for (int e = threadIdx.x; e < elements; e += kThreads) {
    out[e] = FromFloat<T>(acc[e] / sum[e / head_dim] * a.kv.v_scale);
  }
}

using Kernel = void (*)(PlainAttentionArgs);

Kernel Find(Type type, Type kv_type) {
  if (type == Type::kF32 && kv_type == Type::kF32) return PlainKernel<float, float>;
  if (type == Type::kF16 && kv_type == Type::kF16) return PlainKernel<__half, __half>;
  if (type == Type::kF16 && kv_type == Type::kE4M3) return PlainKernel<__half, __nv_fp8_e4m3>;
  if (type == Type::kBF16 && kv_type == Type::kBF16) {
    return PlainKernel<__nv_bfloat16, __nv_bfloat16>;
  }
  if (type == Type::kBF16 && kv_type == Type::kE4M3) {
    return PlainKernel<__nv_bfloat16, __nv_fp8_e4m3>;
  }
  return nullptr;
}

size_t SharedBytes(int group, int head_dim) {
  return sizeof(float) * group * (2 * head_dim + kChunk + 2);
}

}  // namespace

cudaError_t InitPlainAttention() {
  const Type pairs[][2] = {{Type::kF32, Type::kF32},
                           {Type::kF16, Type::kF16},
                           {Type::kF16, Type::kE4M3},
                           {Type::kBF16, Type::kBF16},
                           {Type::kBF16, Type::kE4M3}};
  for (const auto& pair : pairs) {
    const cudaError_t status =
        cudaFuncSetAttribute(Find(pair[0], pair[1]), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(SharedBytes(kMaxGroup, kMaxHeadDim)));
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

cudaError_t PlainAttention(const Launch& launch, const PlainAttentionArgs& args) {
  if (args.max_count == 0 || args.num_spans == 0) return cudaSuccess;
  const Kernel kernel = Find(args.type, args.kv.type);
  if (kernel == nullptr || args.kv.kv_heads < 1 || args.heads % args.kv.kv_heads != 0) {
    return cudaErrorInvalidValue;
  }
  const int group = args.heads / args.kv.kv_heads;
  if (group < 1 || group > kMaxGroup || args.kv.head_dim < 1 || args.kv.head_dim > kMaxHeadDim ||
      args.kv.block_size < 1) {
    return cudaErrorInvalidValue;
  }
  PlainAttentionArgs a = args;
  if (a.kv.type != Type::kE4M3) a.kv.k_scale = a.kv.v_scale = 1.0f;
  const dim3 grid(args.max_count, args.kv.kv_heads, args.num_spans);
  return LaunchKernel(launch, kernel, grid, kThreads, SharedBytes(group, args.kv.head_dim), 1, a);
}

}  // namespace lockstep::kernels
