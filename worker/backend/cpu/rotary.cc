#include "worker/backend/cpu/rotary.h"

#include <cmath>
#include <numbers>

namespace lockstep::cpu {
namespace {

// Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, and
// those between blended.
double Llama3Scaled(double frequency, const RopeConfig& rope) {
  const double original = static_cast<double>(rope.original_max_position_embeddings);
  const double wavelength = 2.0 * std::numbers::pi / frequency;
  if (wavelength < original / rope.high_freq_factor) return frequency;
  if (wavelength > original / rope.low_freq_factor) return frequency / rope.factor;
  const double smooth = (original / wavelength - rope.low_freq_factor) /
                        (rope.high_freq_factor - rope.low_freq_factor);
  return (1.0 - smooth) * frequency / rope.factor + smooth * frequency;
}

}  // namespace

std::vector<float> RotaryFrequencies(const RopeConfig& rope, int64_t head_dim) {
  std::vector<float> frequencies;
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(head_dim);
    double frequency = std::pow(rope.theta, -exponent);
    if (rope.scaling == RopeScalingKind::kLinear) frequency /= rope.factor;
    if (rope.scaling == RopeScalingKind::kLlama3) frequency = Llama3Scaled(frequency, rope);
    frequencies.push_back(static_cast<float>(frequency));
  }
  return frequencies;
}

void RotaryTable::Prepare(absl::Span<const int64_t> positions, ThreadPool& pool) {
  const int64_t rows = static_cast<int64_t>(positions.size());
  table_.resize(2 * rows * half_);
  pool.ParallelFor(rows, [&](int64_t r, int) {
    float* cos = table_.data() + 2 * r * half_;
    float* sin = cos + half_;
    for (int64_t i = 0; i < half_; ++i) {
      // The angle is rounded to a float, as the models' own code does: at long
      // positions that rounding is part of what they were trained with.
      const double angle = static_cast<float>(positions[r]) * frequencies_[i];
      cos[i] = static_cast<float>(std::cos(angle));
      sin[i] = static_cast<float>(std::sin(angle));
    }
  });
}

}  // namespace lockstep::cpu
