// Cosines and sines of the positions of a step, made once and used by every
// layer. Rotary embedding as in "RoFormer" (Su et al., 2021) with the halves of
// a head paired (x[i], x[i + head_dim/2]), and the frequency scalings "linear"
// and "llama3" (the Llama 3.1 model card).
#ifndef LOCKSTEP_WORKER_BACKEND_CPU_ROTARY_H_
#define LOCKSTEP_WORKER_BACKEND_CPU_ROTARY_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "model/model_config.h"
#include "worker/thread_pool.h"

namespace lockstep::cpu {

// Radians a position, head_dim / 2 of them.
std::vector<float> RotaryFrequencies(const RopeConfig& rope, int64_t head_dim);

class RotaryTable {
 public:
  RotaryTable(const RopeConfig& rope, int64_t head_dim)
      : half_(head_dim / 2), frequencies_(RotaryFrequencies(rope, head_dim)) {}

  // Makes room for `rows` positions.
  void Reserve(int64_t rows) { table_.reserve(2 * rows * half_); }
  int64_t bytes() const { return static_cast<int64_t>(table_.capacity() * sizeof(float)); }

  // Row r is of positions[r].
  void Prepare(absl::Span<const int64_t> positions, ThreadPool& pool);

  const float* Cos(int64_t row) const { return table_.data() + 2 * row * half_; }
  const float* Sin(int64_t row) const { return Cos(row) + half_; }

 private:
  const int64_t half_;
  const std::vector<float> frequencies_;
  std::vector<float> table_;  // [rows, cos then sin, half]
};

}  // namespace lockstep::cpu

#endif  // LOCKSTEP_WORKER_BACKEND_CPU_ROTARY_H_
