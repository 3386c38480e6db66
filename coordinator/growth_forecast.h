// How many blocks running sequences will want at once, at the worst moment ahead: each grows
// by a token a step until it ends, and then gives back what it holds. Admission by this, and
// not by declared lengths alone, neither leaves blocks idle that will come back in time nor
// starts sequences that would soon be preempted, whose work is then done twice.
//
//   GrowthForecast forecast(block_size);
//   for (running) forecast.Add({tokens it is expected to add, blocks it holds alone});
//   if (forecast.Fits(newcomer, available - what it needs now)) start it
#ifndef LOCKSTEP_COORDINATOR_GROWTH_FORECAST_H_
#define LOCKSTEP_COORDINATOR_GROWTH_FORECAST_H_

#include <cstdint>
#include <vector>

namespace lockstep {

class GrowthForecast {
 public:
  struct Run {
    uint32_t tokens = 0;  // that it will still add
    uint32_t blocks = 0;  // that it holds today and nobody else does
    uint32_t most = 0;    // blocks by which it can grow at all
  };

  explicit GrowthForecast(uint32_t block_size) : block_size_(block_size) {}

  void Add(const Run& run);
  // Whether `room` blocks beyond those held today are enough for all runs and `newcomer` at
  // any later time. Where there are plenty it is a comparison; else linear in the runs, which
  // the first such question sorts.
  bool Fits(const Run& newcomer, uint64_t room);

 private:
  uint64_t GrowthOf(const Run& run) const;
  uint64_t PeakWith(const Run& newcomer);

  const uint32_t block_size_;
  std::vector<Run> runs_;
  bool sorted_ = true;   // most tokens first
  uint64_t growth_ = 0;  // of all runs, each until its own end
  uint64_t blocks_ = 0;
};

// How long answers are that nothing cuts short: all tokens over the answers that ended by
// themselves, which is the mean of lifetimes of which some were not seen to their end (the
// exponential distribution's maximum likelihood). Old answers count less and less.
class AnswerLength {
 public:
  explicit AnswerLength(uint32_t expected);

  // cut: it reached the length that its request declared.
  void Ended(uint32_t tokens, bool cut);
  // Tokens that an answer of `generated` so far is expected to have yet, of `left` at most:
  // what it lacks to the mean, or half as many again once it has outlived it.
  uint32_t Remaining(uint32_t generated, uint32_t left) const;

 private:
  double tokens_, ends_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_GROWTH_FORECAST_H_
