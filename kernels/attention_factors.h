// What attention multiplies by, and where: inside of the attention kernels.
#ifndef LOCKSTEP_KERNELS_ATTENTION_FACTORS_H_
#define LOCKSTEP_KERNELS_ATTENTION_FACTORS_H_

#include "kernels/types.h"

namespace lockstep::kernels {

inline constexpr float kLog2E = 1.4426950408889634f;

struct AttentionFactors {
  float q = 1.0f;                            // q, before it is rounded to the products' type
  float score = 1.0f;                        // the rest of scale * log2(e) * k_scale
  float v = 1.0f;                            // what is read of v
  float inverse_k = 1.0f, inverse_v = 1.0f;  // what is stored
};

// Over e4m3 the products are f16: q is scaled first, so that bf16's range fits.
inline AttentionFactors FactorsOf(Type type, const KvLayer& kv, float scale) {
  AttentionFactors f;
  const bool narrow = kv.type == Type::kE4M3;
  const float factor = scale * kLog2E * (narrow ? kv.k_scale : 1.0f);
  (narrow && type == Type::kBF16 ? f.q : f.score) = factor;
  if (!narrow) return f;
  f.v = kv.v_scale;
  f.inverse_k = 1.0f / kv.k_scale;
  f.inverse_v = 1.0f / kv.v_scale;
  return f;
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_ATTENTION_FACTORS_H_
