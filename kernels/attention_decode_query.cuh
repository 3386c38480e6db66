// What of a decoded row itself the kernel needs: its query heads, and its own k and v where
// they come with them, turned by rotary embedding on the way.
#ifndef LOCKSTEP_KERNELS_ATTENTION_DECODE_QUERY_CUH_
#define LOCKSTEP_KERNELS_ATTENTION_DECODE_QUERY_CUH_

#include <cstdint>
#include <type_traits>

#include "kernels/attention_decode_deal.cuh"
#include "kernels/attention_decode_launch.h"
#include "kernels/attention_mma.cuh"

namespace lockstep::kernels::decode {

// What turns chunk `chunk` of a head: cosine and sine of eight elements.
struct Angles {
  float4 twos[4];
  bool low;  // of a head's first half

  __device__ __forceinline__ void Load(const float2* rotary, int chunk, int half) {
    low = chunk * 8 < half;
    const float4* at =
        reinterpret_cast<const float4*>(rotary + (low ? chunk * 8 : chunk * 8 - half));
#pragma unroll
    for (int i = 0; i < 4; ++i) twos[i] = __ldg(at + i);
  }
};
// Rotates a chunk in place; `partner` holds the other half's.
__device__ __forceinline__ void Rotate(float (&x)[8], const float (&partner)[8],
                                       const Angles& angles) {
  const bool low = angles.low;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 two = angles.twos[i];
    const float sin0 = low ? -two.y : two.y, sin1 = low ? -two.w : two.w;
    x[2 * i] = __fmaf_rn(partner[2 * i], sin0, x[2 * i] * two.x);
    x[2 * i + 1] = __fmaf_rn(partner[2 * i + 1], sin1, x[2 * i + 1] * two.z);
  }
}

// The chunk of a head of so many that rotates with `chunk`.
__device__ __forceinline__ int PartnerOf(int chunk, int chunks) {
  return chunk < chunks / 2 ? chunk + chunks / 2 : chunk - chunks / 2;
}

template <typename T>
__device__ __forceinline__ Packed<T, 8> LoadChunk(const T* head, int chunk) {
  return LoadData<T, 8>(head + chunk * 8);
}

template <typename KV>
__device__ __forceinline__ typename Chunk<KV>::Raw Narrow(float (&x)[8], float inverse_scale) {
  if constexpr (sizeof(KV) == 1) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= inverse_scale;
  }
  return Pack<KV, 8>(x).raw;
}

// The row's own k and v, one chunk a lane: into `stash` and, where they are
// fresh, into the cache. In two parts, so that q can be requested in between.
template <typename T, typename KV>
class OwnPosition {
 public:
  using Raw = typename Chunk<KV>::Raw;
  __device__ __forceinline__ OwnPosition(const Params& p, const Place& place, int64_t offset)
      : p_(p),
        place_(place),
        k_at_(reinterpret_cast<Raw*>(static_cast<KV*>(p.k) + offset) + threadIdx.x % 32),
        v_at_(reinterpret_cast<Raw*>(static_cast<KV*>(p.v) + offset) + threadIdx.x % 32) {}

  __device__ __forceinline__ void Request(const float2* rotary) {
    const int chunk = threadIdx.x % 32, chunks = p_.head_dim / 8;
    if (chunk >= chunks) return;
    if (rotary != nullptr) angles_.Load(rotary, chunk, p_.head_dim / 2);
    if (p_.fresh_k == nullptr) {
      k_ = __ldcg(k_at_);
      v_ = __ldcg(v_at_);
      return;
    }
    const int64_t at =
        static_cast<int64_t>(place_.row) * p_.q_stride + place_.kv_head * p_.head_dim;
    const T* k = static_cast<const T*>(p_.fresh_k) + at;
    fresh_k_ = LoadChunk(k, chunk);
    partner_ = LoadChunk(k, PartnerOf(chunk, chunks));
    fresh_v_ = LoadChunk(static_cast<const T*>(p_.fresh_v) + at, chunk);
  }

  // row_factor: of p.scales.
  __device__ __forceinline__ void Store(float row_factor, const float2* rotary, Raw* stash_k,
                                        Raw* stash_v) {
    const int chunk = threadIdx.x % 32, chunks = p_.head_dim / 8;
    if (chunk < chunks) {
      if (p_.fresh_k != nullptr) {
        const int column = place_.kv_head * p_.head_dim;
        float x[8], partner[8];
        Unpack<T, 8>(fresh_k_, x);
        ScaleProduct<T>(p_.scales, row_factor, p_.k_column + column + chunk * 8, x);
        Unpack<T, 8>(partner_, partner);
        ScaleProduct<T>(p_.scales, row_factor, p_.k_column + column + PartnerOf(chunk, chunks) * 8,
                        partner);
        if (rotary != nullptr) Rotate(x, partner, angles_);
        k_ = Narrow<KV>(x, p_.factors.inverse_k);
        Unpack<T, 8>(fresh_v_, x);
        ScaleProduct<T>(p_.scales, row_factor, p_.v_column + column + chunk * 8, x);
        v_ = Narrow<KV>(x, p_.factors.inverse_v);
        *k_at_ = k_;
        *v_at_ = v_;
      }
      stash_k[chunk] = k_;
      stash_v[chunk] = v_;
    }
    __syncwarp();
  }

 private:
  const Params& p_;
  const Place& place_;
  Raw* k_at_;
  Raw* v_at_;
  Raw k_ = {}, v_ = {};
  Packed<T, 8> fresh_k_ = {}, partner_ = {}, fresh_v_ = {};
  Angles angles_ = {};
};

// The block's query heads, turned, scaled and as the products take them: [head][chunk].
// Together, since every warp waits as long for what one thread would load as for all.
template <typename T, typename M>
__device__ __forceinline__ void StageQuery(const Params& p, const Place& place, float row_factor,
                                           const float2* rotary, uint4* to) {
  const int chunks = p.head_dim / 8;
  const int first = place.kv_head * p.group * p.head_dim;
  const T* heads =
      static_cast<const T*>(p.q) + static_cast<int64_t>(place.row) * p.q_stride + first;
  for (int i = threadIdx.x; i < p.group * chunks; i += kThreads) {
    const int head = i / chunks, chunk = i - head * chunks;
    const T* at = heads + head * p.head_dim;
    const int other = PartnerOf(chunk, chunks);
    const Packed<T, 8> own = LoadChunk(at, chunk);
    if (std::is_same_v<T, M> && rotary == nullptr && p.scales.rows == nullptr) {
      to[i] = own.raw;
      continue;
    }
    Packed<T, 8> other_half = {};
    Angles angles = {};
    if (rotary != nullptr) {
      other_half = LoadChunk(at, other);
      angles.Load(rotary, chunk, p.head_dim / 2);
    }
    const int column = first + head * p.head_dim;
    float x[8];
    Unpack<T, 8>(own, x);
    ScaleProduct<T>(p.scales, row_factor, column + chunk * 8, x);
    if (rotary != nullptr) {
      float partner[8];
      Unpack<T, 8>(other_half, partner);
      ScaleProduct<T>(p.scales, row_factor, column + other * 8, partner);
      Rotate(x, partner, angles);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] *= p.factors.q;
    to[i] = Pack<M, 8>(x).raw;
  }
}

// What a lane needs of that: of head r of each tile of 8 the chunks that it has of a key, zero
// where there is no such head or chunk.
template <typename KV, int kHeadTiles, int kKChunks>
__device__ __forceinline__ void LoadQuery(const Params& p, const uint4* staged,
                                          uint4 (&q)[kHeadTiles][kKChunks]) {
  const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4, chunks = p.head_dim / 8;
#pragma unroll
  for (int n = 0; n < kHeadTiles; ++n) {
#pragma unroll
    for (int j = 0; j < kKChunks; ++j) {
      const int head = 8 * n + r, chunk = ChunkOf<KV, kKChunks>(c, 4, j);
      q[n][j] =
          head < p.group && chunk < chunks ? staged[head * chunks + chunk] : make_uint4(0, 0, 0, 0);
    }
  }
}

}  // namespace lockstep::kernels::decode

#endif  // LOCKSTEP_KERNELS_ATTENTION_DECODE_QUERY_CUH_
