#include "tests/sim/client_mix.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/kv/block_table.h"
#include "coordinator/sequence.h"
#include "tests/sim/sim_model.h"

namespace lockstep::sim {

SchedulerConfig DrawConfig(Scenario scenario, Random* random) {
  SchedulerConfig c;
  c.vocab_size = kVocab;
  c.max_num_seqs = random->Between(1, 8);
  c.max_batched_tokens = random->OneOf({1, 3, 8, 16, 64});
  c.max_model_len = random->Between(8, 64);
  c.block_size = random->OneOf({1, 2, 4, 4, 8, 16});
  const uint32_t longest = BlocksForTokens(c.max_model_len, c.block_size);
  // From too small for the longest request to plenty for all.
  c.num_kv_blocks = random->Between(std::max(1u, longest / 2), longest * c.max_num_seqs + 1);
  if (random->Percent(20)) c.num_kv_blocks = longest;
  if (random->Percent(40)) c.num_kv_blocks = longest + random->Below(longest / 2 + 1);
  c.max_queued_requests = random->OneOf({1, 4, 16, 64});
  c.enable_prefix_caching = random->Percent(75);
  c.max_plans_in_flight = random->Percent(85) ? 2 : 1;
  c.cache_hash_key = random->Next();
  c.forecast_growth = c.cache_hash_key % 4 == 0;  // it keeps blocks from being short
  // A position found in the cache is not computed, and nobody dies of it.
  if (scenario == Scenario::kPoisoned) c.enable_prefix_caching = false;
  if (scenario == Scenario::kOverloaded) {
    c.max_num_seqs = 8;
    c.max_model_len = 64;
    c.block_size = 4;
    c.num_kv_blocks = 32;  // 8 sequences of 64 positions want 128
    c.max_batched_tokens = 64;
    c.max_queued_requests = 64;
  }
  return c;
}

Weather DrawWeather(Scenario scenario, Random* random) {
  if (scenario == Scenario::kOverloaded) {
    return {.arrivals = 30, .schedules = 40, .answers = 30, .num_requests = 32};
  }
  Weather w;
  if (scenario == Scenario::kPoisoned) {
    return {.arrivals = random->OneOf({2, 10, 40}),
            .schedules = random->OneOf({20, 40}),
            .answers = random->OneOf({20, 40}),
            .killers = random->OneOf({5, 20, 50}),
            .num_requests = random->Between(5, 40)};
  }
  w.arrivals = random->OneOf({2, 10, 40});
  w.cancels = random->OneOf({0, 2, 10});
  w.deaths = random->OneOf({0, 0, 1, 2});
  w.lies = random->OneOf({0, 0, 1});
  w.schedules = random->OneOf({20, 40});
  w.answers = random->OneOf({20, 40});
  w.deadlines = random->OneOf({0, 10, 30});
  w.poison = random->OneOf({0, 0, 5});
  w.killers = random->OneOf({0, 0, 0, 3});
  w.stops = random->OneOf({0, 10, 30});
  w.num_requests = random->Between(5, 60);
  return w;
}

ClientMix::ClientMix(const SchedulerConfig& config, Scenario scenario, const Weather& weather,
                     Random* random)
    : config_(config), scenario_(scenario), weather_(weather), random_(random) {
  for (int i = 0; i < 3; ++i) {
    std::vector<TokenId> opening(config.max_model_len);
    for (TokenId& token : opening) token = random->Below(kVocab);
    openings_.push_back(std::move(opening));
  }
}

std::vector<TokenId> ClientMix::DrawPrompt(uint32_t longest) {
  std::vector<TokenId> prompt;
  const uint32_t length = random_->Between(1, longest);
  if (random_->Percent(70)) prompt = openings_[random_->Below(3)];
  prompt.resize(std::min<size_t>(prompt.size(), random_->Below(length + 1)));
  while (prompt.size() < length) prompt.push_back(random_->Below(kVocab));
  return prompt;
}

Ledger::Entry ClientMix::Draw(int64_t now_ms, PoisonSet* poison) {
  Ledger::Entry entry;
  Request& r = entry.request;
  r.id = RequestId(next_id_++);
  entry.arrival = r.id.value;
  r.external_id = absl::StrCat("r", r.id.value);
  r.arrival_ms = now_ms;
  SamplingParams& p = r.sampling;
  p.seed = static_cast<int64_t>(random_->Next());
  if (scenario_ == Scenario::kOverloaded) {
    r.prompt = DrawPrompt(16);
    p.max_tokens = config_.max_model_len - static_cast<uint32_t>(r.prompt.size());
    entry.outputs.resize(1);
    return entry;
  }
  // Half of them begin short, so that many run at once and then grow.
  r.prompt = DrawPrompt(random_->Percent(50) ? config_.max_model_len : 6);
  const uint32_t room = config_.max_model_len - static_cast<uint32_t>(r.prompt.size());
  p.max_tokens = random_->Percent(90) ? random_->Below(room + 1) : random_->Below(room + 10);
  p.n = random_->Percent(80) ? 1 : random_->Between(2, 4);
  if (random_->Percent(15)) p.prompt_logprobs = 0;
  if (random_->Percent(20)) p.logprobs = 2;
  const bool may_end = random_->Percent(60);
  for (TokenId token = 0; may_end && token < kVocab; ++token) {
    if (random_->Percent(3)) r.ending_ids.push_back(token);
  }
  if (random_->Percent(20)) p.min_tokens = random_->Below(8);
  if (random_->Percent(30)) r.priority = static_cast<int32_t>(random_->Below(3)) - 1;
  if (random_->Percent(weather_.deadlines)) r.deadline_ms = now_ms + random_->Between(1, 2'000);
  if (random_->Percent(20)) r.cache_salt = random_->Below(3);
  if (random_->Percent(weather_.killers)) entry.kills_at = random_->Below(config_.max_model_len);
  entry.outputs.resize(p.n);
  for (uint32_t i = 0; i < p.n; ++i) {
    const uint32_t answer = std::max(1u, p.max_tokens);
    if (random_->Percent(weather_.stops)) entry.outputs[i].stop_at = random_->Below(answer);
    if (random_->Percent(weather_.poison)) {
      entry.poisoned = true;
      poison->insert({SequenceSeed(*p.seed, i),
                      static_cast<uint32_t>(r.prompt.size()) + random_->Below(answer)});
    }
  }
  return entry;
}

}  // namespace lockstep::sim
