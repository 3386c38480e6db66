// Attention of one row over the block table, for the query heads that share one
// KV head, over a vector type V of vec_*.h. Included by kernels_*.cc alone.
//
//   score[p] = scale * (q . k[p])       lanes over head_dim
//   out      = sum over p of exp(score[p] - max) * v[p], in order of p, / sum of exp
//
// The sum of exp has lanes over p - begin. Nothing depends on the blocks, on the
// other rows of the step, or on how many heads share the KV head.
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_ATTENTION_INL_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_ATTENTION_INL_H_

#include <cstdint>

#include "worker/backend/cpu/gemm_inl.h"
#include "worker/backend/cpu/rows_inl.h"

namespace lockstep::cpu {

// Calls fn(first, count, position) for each stretch of positions in one block;
// position points at the first one's vector.
template <class T, class Fn>
LOCKSTEP_INLINE void ForEachStretch(const AttentionTask& t, const void* base, Fn fn) {
  for (int64_t p = t.begin; p < t.end;) {
    const int64_t in_block = p % t.block_size;
    const int64_t rest = t.block_size - in_block;
    const int64_t count = t.end - p < rest ? t.end - p : rest;
    const T* block = static_cast<const T*>(base) + t.table[p / t.block_size] * t.block_stride;
    fn(p, count, block + in_block * t.head_dim);
    p += count;
  }
}

// The scores of HR heads from `head` on.
template <class V, class T, int HR>
LOCKSTEP_INLINE void Scores(const AttentionTask& t, int64_t head, int64_t ld) {
  ForEachStretch<T>(t, t.k, [&](int64_t p, int64_t count, const T* k) {
    float* out = t.scores + head * ld + (p - t.begin);
    const float* q = t.q + head * t.head_dim;
    int64_t n = 0;
    float dots[HR * 4];
    for (; n + 4 <= count; n += 4, k += 4 * t.head_dim) {
      const T* rows[4] = {k, k + t.head_dim, k + 2 * t.head_dim, k + 3 * t.head_dim};
      DotTile<V, T, HR, 4>(q, t.head_dim, rows, t.head_dim, dots, nullptr);
      for (int h = 0; h < HR; ++h) {
        for (int j = 0; j < 4; ++j) out[h * ld + n + j] = dots[h * 4 + j] * t.scale;
      }
    }
    for (; n < count; ++n, k += t.head_dim) {
      DotTile<V, T, HR, 1>(q, t.head_dim, &k, t.head_dim, dots, nullptr);
      for (int h = 0; h < HR; ++h) out[h * ld + n] = dots[h] * t.scale;
    }
  });
}

// NV vectors from element d on of HR heads from `head` on. tail: elements of the
// only vector, when it is not whole.
template <class V, class T, int HR, int NV>
LOCKSTEP_INLINE void WeightedSum(const AttentionTask& t, int64_t head, int64_t ld, int64_t d,
                                 int64_t tail, const float* inverse_sums) {
  typename V::F acc[HR][NV];
  for (int h = 0; h < HR; ++h) {
    for (int c = 0; c < NV; ++c) acc[h][c] = V::Zero();
  }
  ForEachStretch<T>(t, t.v, [&](int64_t p, int64_t count, const T* v) {
    const float* weights = t.scores + head * ld + (p - t.begin);
    v += d;
    for (int64_t n = 0; n < count; ++n, v += t.head_dim) {
      typename V::F value[NV];
      for (int c = 0; c < NV; ++c) {
        value[c] = tail == 0 ? V::Load(v + c * kLanes) : V::LoadFirst(v, tail);
      }
      for (int h = 0; h < HR; ++h) {
        const typename V::F weight = V::Set(weights[h * ld + n]);
        for (int c = 0; c < NV; ++c) acc[h][c] = V::Fma(weight, value[c], acc[h][c]);
      }
    }
  });
  for (int h = 0; h < HR; ++h) {
    float* out = t.out + (head + h) * t.head_dim + d;
    const typename V::F inverse = V::Set(inverse_sums[head + h]);
    for (int c = 0; c < NV; ++c) {
      const typename V::F x = V::Mul(acc[h][c], inverse);
      if (tail == 0) {
        V::Store(out + c * kLanes, x);
      } else {
        V::StoreFirst(out, x, tail);
      }
    }
  }
}

template <class V, class T, int HR>
LOCKSTEP_INLINE void WeightedSums(const AttentionTask& t, int64_t head, int64_t ld,
                                  const float* inverse_sums) {
  int64_t d = 0;
  for (; d + V::kSumVecs * kLanes <= t.head_dim; d += V::kSumVecs * kLanes) {
    WeightedSum<V, T, HR, V::kSumVecs>(t, head, ld, d, 0, inverse_sums);
  }
  for (; d + kLanes <= t.head_dim; d += kLanes) {
    WeightedSum<V, T, HR, 1>(t, head, ld, d, 0, inverse_sums);
  }
  if (d < t.head_dim) WeightedSum<V, T, HR, 1>(t, head, ld, d, t.head_dim - d, inverse_sums);
}

inline constexpr int64_t kHeadsAtOnce = 16;

template <class V, class T>
void AttentionOf(const AttentionTask& whole) {
  // A few heads at a time, so that their sums fit on the stack.
  AttentionTask t = whole;
  const int64_t seen = t.end - t.begin;
  const int64_t ld = (seen + kLanes - 1) / kLanes * kLanes;
  for (int64_t left = whole.heads; left > 0; left -= kHeadsAtOnce) {
    t.heads = left < kHeadsAtOnce ? left : kHeadsAtOnce;
    int64_t head = 0;
    for (; head + V::kDotHeads <= t.heads; head += V::kDotHeads) {
      Scores<V, T, V::kDotHeads>(t, head, ld);
    }
    for (; head < t.heads; ++head) Scores<V, T, 1>(t, head, ld);

    float inverse_sums[kHeadsAtOnce];
    for (int64_t h = 0; h < t.heads; ++h) {
      float* scores = t.scores + h * ld;
      inverse_sums[h] = 1.0f / ExpLanes<V>(scores, MaxOf<V>(scores, seen), seen, scores);
    }

    head = 0;
    for (; head + V::kSumHeads <= t.heads; head += V::kSumHeads) {
      WeightedSums<V, T, V::kSumHeads>(t, head, ld, inverse_sums);
    }
    for (; head < t.heads; ++head) WeightedSums<V, T, 1>(t, head, ld, inverse_sums);
    t.q += t.heads * t.head_dim;
    t.out += t.heads * t.head_dim;
  }
}

template <class V>
void Attention(const AttentionTask& task) {
  switch (task.dtype) {
    case DType::kBFloat16:
      return AttentionOf<V, BFloat16>(task);
    case DType::kFloat16:
      return AttentionOf<V, Float16>(task);
    default:
      return AttentionOf<V, float>(task);
  }
}

}  // namespace lockstep::cpu

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_ATTENTION_INL_H_
