// Attention of the walk through the layers: a block's share of a KV head's context, and the
// merging of shares, both of whose results go from block to block as words. Tiles of 16
// positions come through the warps' rings; the products are those of
// attention_decode_kernel.cuh.
#ifndef LOCKSTEP_KERNELS_ROW_STACK_ATTENTION_CUH_
#define LOCKSTEP_KERNELS_ROW_STACK_ATTENTION_CUH_

#include <cmath>

#include "kernels/attention_decode_query.cuh"
#include "kernels/attention_decode_tile.cuh"
#include "kernels/row_stack_feed.cuh"
#include "kernels/row_stack_words.cuh"

namespace lockstep::kernels::stack {

template <typename T, typename KV, int kDim>
class Attention {
 public:
  using M = typename Chunk<KV>::M;
  using Raw = typename Chunk<KV>::Raw;
  static constexpr int kChunks = kDim / 8;

  __device__ __forceinline__ Attention(const Params& p, const Place& place, uint8_t* shared)
      : p_(p),
        layer_(p.layers[place.layer]),
        parity_(place.layer & 1),
        number_(place.layer),
        place_(place),
        share_(place.share),
        query_(reinterpret_cast<uint4*>(shared)),
        stash_k_(reinterpret_cast<Raw*>(query_ + p.group * kChunks)),
        stash_v_(stash_k_ + kChunks),
        outputs_(reinterpret_cast<float*>(query_ + (p.group + 2) * kChunks)),
        statistics_(reinterpret_cast<float2*>(outputs_ + kWarps * p.group * OutStride(kDim))) {}

  // Of the whole block, behind a barrier: this block's share, sent to those who merge.
  __device__ __forceinline__ void Run(Ring& ring) {
    if (!share_.mine) return;
    StageOwn();
    SyncThreads();
    decode::TileSums<KV, kDim, 1> sums;
    if (share_.any()) TakeTiles(ring, sums);
    KeepShare(sums);
    SyncThreads();
    SendShare();
  }

  // Of the whole block: its part of the result, merged from all shares and sent to all.
  __device__ __forceinline__ void Merge() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int width = p_.heads * kDim;
    const float* partials = reinterpret_cast<const float*>(p_.words.partials[parity_]);
    const float2* statistics = reinterpret_cast<const float2*>(p_.words.statistics[parity_]);
#pragma unroll 1
    for (int vector = static_cast<int>(blockIdx.x) + warp * p_.blocks; vector < width / 8;
         vector += kWarps * p_.blocks) {
      const int head = vector / kChunks;
      // A lane without a share reads the first one's and gives it no weight.
      const int share = lane < share_.shares ? lane : 0;
      const uint4* const from =
          reinterpret_cast<const uint4*>(partials + static_cast<int64_t>(share) * width) +
          vector * 2;
      const uint2* const of_head =
          reinterpret_cast<const uint2*>(statistics + share * p_.heads + head);
      uint4 words[2];
      uint2 two;
      PeerWaiter waiter(p_.exchange.limits, PeerWait::kOwnBlocks, number_);
      for (;;) {
        words[0] = LoadWords(from);
        words[1] = LoadWords(from + 1);
        two = LoadWords(of_head);
        const bool missing = !Arrived(words[0]) || !Arrived(words[1]) || !Arrived(two);
        if (!__any_sync(~0u, missing) || __any_sync(~0u, waiter.Over(p_.exchange.rank))) break;
      }
      const uint32_t bits[8] = {words[0].x, words[0].y, words[0].z, words[0].w,
                                words[1].x, words[1].y, words[1].z, words[1].w};
      float v[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = __uint_as_float(bits[e]);
      float2 s = {__uint_as_float(two.x), __uint_as_float(two.y)};
      if (lane >= share_.shares) s.x = -INFINITY;
      const float top = WarpMax(s.x);
      const float weight = Exp2(s.x - (top == -INFINITY ? 0.0f : top));
      const float factor = __fdividef(layer_.factors.v, WarpSum(s.y * weight));
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] = WarpSum(v[e] * weight) * factor;
      if (lane == 0) {
        StoreWords(reinterpret_cast<uint4*>(p_.words.heads[parity_]) + vector,
                   Sendable(PackVector<T>(v)));
      }
    }
  }

 private:
  // The query heads of this KV head, turned and scaled, and of the block that has the row's
  // own position its k and v, which go to the cache too.
  __device__ __forceinline__ void StageOwn() {
    const int group = p_.group, half = kChunks / 2;
    const int count = (group + (share_.owns() ? 2 : 0)) * kChunks, tid = threadIdx.x;
    if (tid / 32 * 32 >= count) return;
    const int i = min(tid, count - 1), head = i / kChunks, chunk = i % kChunks;
    const int row_head = head < group ? share_.kv_head * group + head
                                      : p_.heads + (head - group) * p_.kv_heads + share_.kv_head;
    const int position = place_.position;
    const int32_t block =
        __ldcg(p_.rows.block_table + static_cast<int64_t>(place_.slot) * p_.rows.table_stride +
               (position >> p_.block_shift));
    const uint4* qkv = reinterpret_cast<const uint4*>(p_.words.qkv[parity_]) + row_head * kChunks;
    uint4 both[2];
    float x[8];
    if (layer_.rotary != nullptr) {
      decode::Angles angles;
      angles.Load(layer_.rotary + static_cast<int64_t>(position) * (kDim / 2), chunk, kDim / 2);
      AwaitWords<2>(p_.exchange, number_, qkv, chunk, chunk < half ? half : -half, kChunks - 1,
                    both);
      float partner[8], own[8];
      UnpackVector<T>(both[0], own);
      UnpackVector<T>(both[0], x);
      UnpackVector<T>(both[1], partner);
      decode::Rotate(x, partner, angles);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = head > group ? own[e] : x[e];
    } else {
      AwaitWords<2>(p_.exchange, number_, qkv, chunk, 0, chunk, both);
      UnpackVector<T>(both[0], x);
    }
    if (tid >= count) return;
    if (head < group) {
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] *= layer_.factors.q;
      query_[i] = Pack<M, 8>(x).raw;
      return;
    }
    const bool value = head > group;
    const Raw narrow =
        decode::Narrow<KV>(x, value ? layer_.factors.inverse_v : layer_.factors.inverse_k);
    (value ? stash_v_ : stash_k_)[chunk] = narrow;
    const int64_t row =
        ((static_cast<int64_t>(block) * p_.kv_heads + share_.kv_head) << p_.block_shift) +
        (position & ((1 << p_.block_shift) - 1));
    reinterpret_cast<Raw*>(value ? layer_.v : layer_.k)[row * kChunks + chunk] = narrow;
  }

  __device__ __forceinline__ void TakeTiles(Ring& ring, decode::TileSums<KV, kDim, 1>& sums) {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    constexpr int kKChunks = kDim / 32, kVChunks = kDim / 64;
#pragma unroll 1
    for (int tile = share_.first; tile < share_.end; tile += kWarps) {
      // Positions from the row's own on are not in the cache yet.
      const int replaced = tile == share_.last_tile ? place_.position % kTile : kTile;
      const Raw* rows = reinterpret_cast<const Raw*>(ring.Await(false));
      Raw k[2][kKChunks];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Raw* at = r + 8 * i < replaced ? rows + (r + 8 * i) * kChunks : stash_k_;
        LoadChunks<KV, false>(at, kChunks, c, 4, k[i]);
      }
      ring.Release();
      uint4 q[1][kKChunks];  // again for each tile: registers are scarce
#pragma unroll
      for (int j = 0; j < kKChunks; ++j)
        q[0][j] = r < p_.group ? query_[r * kChunks + ChunkOf<KV, kKChunks>(c, 4, j)] : uint4{};
      const int at = tile * kTile + r, unseen = share_.begin - tile * kTile;
      sums.Multiply(q, k);
      sums.Weigh(at >= share_.begin && at <= place_.position,
                 at + 8 >= share_.begin && at + 8 <= place_.position, layer_.factors.score);
      rows = reinterpret_cast<const Raw*>(ring.Await(false));
      Raw v[4][kVChunks];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 2 * c + i % 2 + 8 * (i / 2);
        // What is not seen has no weight, but must be finite.
        const Raw* from = token < replaced ? rows + max(token, unseen) * kChunks : stash_v_;
        LoadChunks<KV, false>(from, kChunks, r, 8, v[i]);
      }
      ring.Release();
      sums.Add(v);
    }
  }

  __device__ __forceinline__ void KeepShare(const decode::TileSums<KV, kDim, 1>& sums) {
    const int warp = threadIdx.x / 32;
    sums.Store(
        p_.group, kDim, [&](int head, float2 s) { statistics_[warp * p_.group + head] = s; },
        [&](int head, int d, float4 v) {
          *reinterpret_cast<float4*>(outputs_ + (warp * p_.group + head) * OutStride(kDim) + d) = v;
        });
  }

  __device__ __forceinline__ void SendShare() {
    const int width = p_.heads * kDim, first = share_.kv_head * p_.group;
    float* partials = reinterpret_cast<float*>(p_.words.partials[parity_]) +
                      static_cast<int64_t>(share_.share) * width + first * kDim;
#pragma unroll 1
    for (int quad = threadIdx.x; quad < p_.group * kDim / 4; quad += kThreads) {
      const int head = quad / (kDim / 4), d = quad % (kDim / 4) * 4;
      float2 shares[kWarps], all = {-INFINITY, 0.0f};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        shares[w] = statistics_[w * p_.group + head];
        all.x = fmaxf(all.x, shares[w].x);
      }
      float v[4] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float weight = Exp2(shares[w].x - (all.x == -INFINITY ? 0.0f : all.x));
        const float4 part = *reinterpret_cast<const float4*>(
            outputs_ + (w * p_.group + head) * OutStride(kDim) + d);
        all.y += weight * shares[w].y;
        v[0] += weight * part.x;
        v[1] += weight * part.y;
        v[2] += weight * part.z;
        v[3] += weight * part.w;
      }
      StoreWords(reinterpret_cast<uint4*>(partials) + quad,
                 Sendable(make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]),
                                     __float_as_uint(v[2]), __float_as_uint(v[3]))));
      if (d == 0) {
        StoreWords(reinterpret_cast<uint2*>(p_.words.statistics[parity_]) +
                       share_.share * p_.heads + first + head,
                   Sendable(make_uint2(__float_as_uint(all.x), __float_as_uint(all.y))));
      }
    }
  }

  const Params& p_;
  const Layer& layer_;
  const int parity_, number_;
  const Place& place_;
  const Share& share_;
  uint4* const query_;
  Raw* const stash_k_;
  Raw* const stash_v_;
  float* const outputs_;
  float2* const statistics_;
};

}  // namespace lockstep::kernels::stack

#endif  // LOCKSTEP_KERNELS_ROW_STACK_ATTENTION_CUH_
