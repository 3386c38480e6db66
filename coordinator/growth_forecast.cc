#include "coordinator/growth_forecast.h"

#include <algorithm>

#include "coordinator/kv/block_table.h"

namespace lockstep {
namespace {

// The first guess counts as so many answers, and each that ends leaves so much of those before.
constexpr double kGuessWeight = 4, kKept = 63.0 / 64;

bool LastsLonger(const GrowthForecast::Run& a, const GrowthForecast::Run& b) {
  return a.tokens > b.tokens;
}

}  // namespace

uint64_t GrowthForecast::GrowthOf(const Run& run) const {
  return std::min(BlocksForTokens(run.tokens, block_size_), run.most);
}

void GrowthForecast::Add(const Run& run) {
  runs_.push_back(run);
  sorted_ = false;
  growth_ += GrowthOf(run);
  blocks_ += run.blocks;
}

bool GrowthForecast::Fits(const Run& newcomer, uint64_t room) {
  // No more than if nothing were given back.
  return growth_ + GrowthOf(newcomer) <= room || PeakWith(newcomer) <= room;
}

// Just before a run ends, all that last as long have grown as much as it, and those that
// end earlier hold nothing.
uint64_t GrowthForecast::PeakWith(const Run& newcomer) {
  if (!sorted_) std::sort(runs_.begin(), runs_.end(), LastsLonger);
  sorted_ = true;
  uint64_t alive = 0, peak = 0, given_back = blocks_ + newcomer.blocks;
  const auto visit = [&](const Run& run) {
    ++alive;
    given_back -= run.blocks;
    const uint64_t growth = alive * BlocksForTokens(run.tokens, block_size_);
    if (growth > given_back) peak = std::max(peak, growth - given_back);
  };
  const auto at = std::upper_bound(runs_.begin(), runs_.end(), newcomer, LastsLonger);
  std::for_each(runs_.begin(), at, visit);
  visit(newcomer);
  std::for_each(at, runs_.end(), visit);
  return peak;
}

AnswerLength::AnswerLength(uint32_t expected)
    : tokens_(kGuessWeight * expected), ends_(kGuessWeight) {}

void AnswerLength::Ended(uint32_t tokens, bool cut) {
  tokens_ = tokens_ * kKept + tokens;
  ends_ = ends_ * kKept + (cut ? 0 : 1);
}

uint32_t AnswerLength::Remaining(uint32_t generated, uint32_t left) const {
  // Where none ends by itself the mean grows beyond all that is declared.
  const double mean = tokens_ / std::max(ends_, 1e-9);
  const double rest = std::max(mean - generated, generated / 2.0);
  return static_cast<uint32_t>(std::min<double>(rest, left));
}

}  // namespace lockstep
