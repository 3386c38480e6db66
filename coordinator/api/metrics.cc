#include "coordinator/api/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/version.h"
#include "coordinator/api/device_metrics.h"

namespace lockstep {
namespace {

using prometheus::Counter;
using prometheus::Gauge;
using prometheus::Histogram;
using Buckets = Histogram::BucketBoundaries;
using Labels = std::map<std::string, std::string>;

// Seconds, fine where a figure is promised and coarse where it is not.
const Buckets kStepBuckets = {0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025,
                              0.05,   0.1,     0.25,   0.5,   1.0,    2.5,   5.0,  10.0};
const Buckets kDeviceBuckets = {2e-6, 3e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3};
const Buckets kPlanBuckets = {5e-6, 1e-5, 2e-5, 4e-5, 8e-5, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 2e-2};
const Buckets kTokenBuckets = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15,
                               0.2,   0.3,    0.4,   0.5,  0.75,  1.0,  2.5,   5.0, 10.0};
const Buckets kFirstTokenBuckets = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,  0.25, 0.5,
                                    0.75,  1.0,   2.5,  5.0,  7.5,  10.0, 20.0, 40.0, 80.0, 160.0};
const Buckets kRequestBuckets = {0.01, 0.05, 0.1,  0.3,  0.5,  0.8,  1.0,   1.5,   2.0,   2.5,
                                 5.0,  10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0};

const char* OutcomeName(RequestOutcome outcome) {
  switch (outcome) {
    case RequestOutcome::kStop:
      return "stop";
    case RequestOutcome::kLength:
      return "length";
    case RequestOutcome::kAbort:
      return "abort";
    case RequestOutcome::kError:
      break;
  }
  return "error";
}

// A part that nobody can tell has no series.
void SetParts(const std::string& rank, const MemoryParts& memory,
              prometheus::Family<Gauge>* family) {
  const std::pair<const char*, std::optional<uint64_t>> parts[] = {
      {"weights", memory.weights},         {"kv", memory.kv},
      {"activations", memory.activations}, {"communication", memory.communication},
      {"runtime", memory.runtime},         {"total", memory.total()},
  };
  for (const auto& [part, bytes] : parts) {
    if (bytes) family->Add({{"rank", rank}, {"part", part}}).Set(static_cast<double>(*bytes));
  }
}

const char* RejectionReason(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
      return "invalid";
    case absl::StatusCode::kResourceExhausted:
      return "full";
    case absl::StatusCode::kUnavailable:
      return "unavailable";
    case absl::StatusCode::kNotFound:
      return "not_found";
    default:
      return "other";
  }
}

// The rank that the others waited for: it waited least, and another one longer by a
// twentieth of the step. -1: none.
int StragglerOf(const std::vector<StepTiming>& timings, double step_seconds) {
  const auto waits_less = [](const StepTiming& a, const StepTiming& b) {
    return a.collective_wait_ns < b.collective_wait_ns;
  };
  const auto [least, most] = std::minmax_element(timings.begin(), timings.end(), waits_less);
  if (least == timings.end()) return -1;
  const double skew_ns = static_cast<double>(most->collective_wait_ns - least->collective_wait_ns);
  if (skew_ns == 0 || skew_ns < 0.05 * step_seconds * 1e9) return -1;
  return static_cast<int>(least - timings.begin());
}

// A step of single tokens is decoding; longer spans are prompts.
const char* StepKind(const StepPlan& plan) {
  bool decode = false, prefill = false;
  for (const Span& span : plan.spans) (span.num_tokens > 1 ? prefill : decode) = true;
  return prefill ? (decode ? "mixed" : "prefill") : "decode";
}

}  // namespace

struct Metrics::Impl {
  explicit Impl(const MetricsLabels& labels)
      : common{{"model_name", labels.model_name}, {"engine", "0"}} {}

  Counter& AddCounter(const std::string& name, const std::string& help, const Labels& labels) {
    return prometheus::BuildCounter().Name(name).Help(help).Register(registry).Add(labels);
  }
  Gauge& AddGauge(const std::string& name, const std::string& help, const Labels& labels = {}) {
    return prometheus::BuildGauge().Name(name).Help(help).Register(registry).Add(labels);
  }
  Histogram& AddHistogram(const std::string& name, const std::string& help, const Buckets& buckets,
                          const Labels& labels) {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add(labels,
                                                                                     buckets);
  }
  Counter& Outcome(RequestOutcome outcome) {
    Labels labels = common;
    labels["finished_reason"] = OutcomeName(outcome);
    return success.Add(labels);
  }
  // Brings a counter to a total that somebody else keeps.
  static void Raise(Counter& counter, uint64_t total) {
    counter.Increment(std::max(0.0, static_cast<double>(total) - counter.Value()));
  }
  void ExposeEngine(const EngineInfo& info, const SchedulerStats& stats);
  void ExposeRanks(const EngineInfo& info);

  const Labels common;
  prometheus::Registry registry;
  std::mutex scrape;  // one scrape at a time: totals are raised, then read
  DeviceMetrics devices{&registry};
  GroupWatch* watch = nullptr;  // null: devices are not exposed

  Gauge& running = AddGauge("vllm:num_requests_running", "Requests that hold a slot.", common);
  Gauge& waiting = AddGauge("vllm:num_requests_waiting", "Requests that wait for one.", common);
  Gauge& kv_usage =
      AddGauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", common);
  Counter& preemptions =
      AddCounter("vllm:num_preemptions_total", "Sequences set back to make room.", common);
  Counter& prompt_tokens =
      AddCounter("vllm:prompt_tokens_total", "Prompt tokens of requests that started.", common);
  Counter& generation_tokens =
      AddCounter("vllm:generation_tokens_total", "Tokens of answers.", common);
  Counter& prefix_queries = AddCounter("vllm:prefix_cache_queries_total",
                                       "Prompt tokens looked up in the prefix cache.", common);
  Counter& prefix_hits =
      AddCounter("vllm:prefix_cache_hits_total", "Prompt tokens found there.", common);
  prometheus::Family<Counter>& success = prometheus::BuildCounter()
                                             .Name("vllm:request_success_total")
                                             .Help("Sequences that ended, by reason.")
                                             .Register(registry);
  Histogram& ttft = AddHistogram("vllm:time_to_first_token_seconds",
                                 "From arrival to the first token.", kFirstTokenBuckets, common);
  Histogram& itl = AddHistogram("vllm:inter_token_latency_seconds",
                                "Between two tokens of a sequence.", kTokenBuckets, common);
  Histogram& tpot = AddHistogram("vllm:request_time_per_output_token_seconds",
                                 "A sequence's mean time between tokens.", kTokenBuckets, common);
  Histogram& e2e = AddHistogram("vllm:e2e_request_latency_seconds",
                                "From arrival to the last token.", kRequestBuckets, common);
  Histogram& queue = AddHistogram("vllm:request_queue_time_seconds",
                                  "From arrival to the first step.", kRequestBuckets, common);
  Histogram& prefill =
      AddHistogram("vllm:request_prefill_time_seconds", "From the first step to the first token.",
                   kRequestBuckets, common);
  Histogram& decode = AddHistogram("vllm:request_decode_time_seconds",
                                   "From the first token to the last.", kRequestBuckets, common);
  prometheus::Family<Gauge>& cache_config = prometheus::BuildGauge()
                                                .Name("vllm:cache_config_info")
                                                .Help("The KV cache's configuration; always 1.")
                                                .Register(registry);

  prometheus::Family<Gauge>& kv_blocks = prometheus::BuildGauge()
                                             .Name("lockstep_kv_blocks")
                                             .Help("KV blocks; free + cached can be used again.")
                                             .Register(registry);
  prometheus::Family<Gauge>& requests = prometheus::BuildGauge()
                                            .Name("lockstep_requests")
                                            .Help("Requests now, by state.")
                                            .Register(registry);
  prometheus::Family<Counter>& requests_total =
      prometheus::BuildCounter()
          .Name("lockstep_requests_total")
          .Help("Requests that reached the engine, by how they left it.")
          .Register(registry);
  prometheus::Family<Counter>& rejections = prometheus::BuildCounter()
                                                .Name("lockstep_rejections_total")
                                                .Help("Requests refused, by reason.")
                                                .Register(registry);
  prometheus::Family<Counter>& http_responses = prometheus::BuildCounter()
                                                    .Name("lockstep_http_responses_total")
                                                    .Help("HTTP answers, by status code.")
                                                    .Register(registry);
  Gauge& epoch = AddGauge("lockstep_epoch", "The group's incarnation.");
  Gauge& ready = AddGauge("lockstep_ready", "1 while the group is whole and stepping.");
  prometheus::Family<Gauge>& worker_up = prometheus::BuildGauge()
                                             .Name("lockstep_worker_up")
                                             .Help("1 while the rank is in a whole group.")
                                             .Register(registry);
  prometheus::Family<Gauge>& weight_bytes = prometheus::BuildGauge()
                                                .Name("lockstep_weight_bytes")
                                                .Help("Resident weights of a rank.")
                                                .Register(registry);
  prometheus::Family<Gauge>& predicted_weight_bytes =
      prometheus::BuildGauge()
          .Name("lockstep_predicted_weight_bytes")
          .Help("Weights of a rank as planned from headers.")
          .Register(registry);
  prometheus::Family<Gauge>& kv_bytes = prometheus::BuildGauge()
                                            .Name("lockstep_kv_bytes")
                                            .Help("KV cache of a rank.")
                                            .Register(registry);
  prometheus::Family<Gauge>& memory_bytes = prometheus::BuildGauge()
                                                .Name("lockstep_memory_bytes")
                                                .Help("Memory of a rank by part, as allocated.")
                                                .Register(registry);
  prometheus::Family<Gauge>& predicted_memory_bytes =
      prometheus::BuildGauge()
          .Name("lockstep_predicted_memory_bytes")
          .Help("Memory of a rank by part, as planned before a weight is read.")
          .Register(registry);
  prometheus::Family<Gauge>& load_phase = prometheus::BuildGauge()
                                              .Name("lockstep_load_phase_seconds")
                                              .Help("Where a rank's last load spent its time.")
                                              .Register(registry);
  prometheus::Family<Gauge>& startup_phase = prometheus::BuildGauge()
                                                 .Name("lockstep_startup_phase_seconds")
                                                 .Help("Where the start-up spent its time.")
                                                 .Register(registry);
  prometheus::Family<Histogram>& step_seconds = prometheus::BuildHistogram()
                                                    .Name("lockstep_step_seconds")
                                                    .Help("Steps, from plan sent to result.")
                                                    .Register(registry);
  Histogram& plan_seconds =
      AddHistogram("lockstep_plan_seconds", "Making a plan.", kPlanBuckets, {});
  prometheus::Family<Histogram>& collective_wait =
      prometheus::BuildHistogram()
          .Name("lockstep_collective_wait_seconds")
          .Help("A rank's wait for slower ranks, per step.")
          .Register(registry);
  prometheus::Family<Histogram>& collective_transfer =
      prometheus::BuildHistogram()
          .Name("lockstep_collective_transfer_seconds")
          .Help("A rank's time in transfers, per step.")
          .Register(registry);
  prometheus::Family<Histogram>& rank_step =
      prometheus::BuildHistogram()
          .Name("lockstep_rank_step_seconds")
          .Help("A rank's own time in a step, by what it went on.")
          .Register(registry);
  prometheus::Family<Histogram>& device_idle =
      prometheus::BuildHistogram()
          .Name("lockstep_device_idle_seconds")
          .Help("A rank's device between two steps, while the next one was known.")
          .Register(registry);
  prometheus::Family<Counter>& collective_bytes = prometheus::BuildCounter()
                                                      .Name("lockstep_collective_bytes_total")
                                                      .Help("Bytes a rank put into collectives.")
                                                      .Register(registry);
  prometheus::Family<Counter>& straggler_steps =
      prometheus::BuildCounter()
          .Name("lockstep_straggler_steps_total")
          .Help("Steps in which the other ranks waited for this one, for 5 % of the step or more.")
          .Register(registry);
  Labels cache_labels;
};

Metrics::Metrics(const MetricsLabels& labels) : impl_(std::make_unique<Impl>(labels)) {
  Impl& m = *impl_;
  m.cache_labels = m.common;
  m.cache_labels["block_size"] = absl::StrCat(labels.block_size);
  m.cache_labels["enable_prefix_caching"] = labels.enable_prefix_caching ? "True" : "False";
  // Series exist from the start, so that a rate over them is never absent.
  for (const RequestOutcome outcome : {RequestOutcome::kStop, RequestOutcome::kLength,
                                       RequestOutcome::kAbort, RequestOutcome::kError}) {
    m.Outcome(outcome);
  }
  for (const char* reason : {"invalid", "full", "unavailable", "not_found"}) {
    m.rejections.Add({{"reason", reason}});
  }
  for (const char* kind : {"decode", "prefill", "mixed"}) {
    m.step_seconds.Add({{"kind", kind}}, kStepBuckets);
  }
  m.AddGauge("lockstep_build_info", "The build; always 1.", {{"version", kVersion}}).Set(1);
}

Metrics::~Metrics() = default;

void Metrics::OnStep(const StepPlan& plan, const GroupStep& step, double plan_seconds,
                     double step_seconds) {
  impl_->step_seconds.Add({{"kind", StepKind(plan)}}, kStepBuckets).Observe(step_seconds);
  impl_->plan_seconds.Observe(plan_seconds);
  const int straggler = StragglerOf(step.timings, step_seconds);
  for (size_t rank = 0; rank < step.timings.size(); ++rank) {
    const Labels labels = {{"rank", absl::StrCat(rank)}};
    const StepTiming& timing = step.timings[rank];
    impl_->straggler_steps.Add(labels).Increment(static_cast<int>(rank) == straggler ? 1 : 0);
    impl_->collective_wait.Add(labels, kStepBuckets)
        .Observe(static_cast<double>(timing.collective_wait_ns) * 1e-9);
    impl_->collective_transfer.Add(labels, kStepBuckets)
        .Observe(static_cast<double>(timing.collective_transfer_ns) * 1e-9);
    impl_->collective_bytes.Add(labels).Increment(static_cast<double>(timing.collective_bytes));
    if (timing.device_idle_ns != 0) {
      impl_->device_idle.Add(labels, kDeviceBuckets)
          .Observe(static_cast<double>(timing.device_idle_ns) * 1e-9);
    }
    for (const auto& [kind, ns] :
         {std::pair("compute", timing.compute_ns), std::pair("sampling", timing.sampling_ns),
          std::pair("total", timing.total_ns)}) {
      impl_->rank_step.Add({{"rank", absl::StrCat(rank)}, {"kind", kind}}, kStepBuckets)
          .Observe(static_cast<double>(ns) * 1e-9);
    }
  }
}

void Metrics::OnRejected(const absl::Status& status) { Rejected(status); }

void Metrics::RequestStarted(uint32_t prompt_tokens, double queue_seconds) {
  impl_->prompt_tokens.Increment(prompt_tokens);
  impl_->queue.Observe(queue_seconds);
}

void Metrics::FirstToken(double since_arrival, double since_start) {
  impl_->ttft.Observe(since_arrival);
  impl_->prefill.Observe(since_start);
}

void Metrics::NextToken(double since_last) { impl_->itl.Observe(since_last); }

void Metrics::TokensDelivered(uint32_t count) { impl_->generation_tokens.Increment(count); }

void Metrics::SequenceFinished(RequestOutcome outcome, uint32_t tokens, double decode_seconds) {
  impl_->Outcome(outcome).Increment();
  if (tokens > 1) impl_->tpot.Observe(decode_seconds / (tokens - 1));
}

void Metrics::RequestFinished(double since_arrival, double since_first_token) {
  impl_->e2e.Observe(since_arrival);
  impl_->decode.Observe(since_first_token);
}

void Metrics::Rejected(const absl::Status& status) {
  impl_->rejections.Add({{"reason", RejectionReason(status)}}).Increment();
}

void Metrics::HttpResponse(int code) {
  impl_->http_responses.Add({{"code", absl::StrCat(code)}}).Increment();
}

void Metrics::SetStartup(const std::vector<std::pair<std::string, double>>& phases) {
  for (const auto& [name, seconds] : phases) {
    impl_->startup_phase.Add({{"phase", name}}).Set(seconds);
  }
}

void Metrics::Impl::ExposeEngine(const EngineInfo& info, const SchedulerStats& stats) {
  running.Set(stats.running);
  waiting.Set(stats.waiting);
  requests.Add({{"state", "running"}}).Set(stats.running);
  requests.Add({{"state", "waiting"}}).Set(stats.waiting);
  const double used = stats.blocks_active + stats.blocks_pending;
  const double total = used + stats.blocks_free + stats.blocks_cached;
  kv_usage.Set(total == 0 ? 0 : used / total);
  kv_blocks.Add({{"state", "free"}}).Set(stats.blocks_free);
  kv_blocks.Add({{"state", "cached"}}).Set(stats.blocks_cached);
  kv_blocks.Add({{"state", "active"}}).Set(stats.blocks_active);
  kv_blocks.Add({{"state", "pending"}}).Set(stats.blocks_pending);
  Raise(preemptions, stats.preemptions);
  Raise(prefix_queries, stats.prefix_cache_queries);
  Raise(prefix_hits, stats.prefix_cache_hits);
  Raise(requests_total.Add({{"outcome", "completed"}}), stats.completed);
  Raise(requests_total.Add({{"outcome", "failed"}}), stats.failed);
  Raise(requests_total.Add({{"outcome", "cancelled"}}), stats.cancelled);
  Raise(requests_total.Add({{"outcome", "rejected"}}), stats.rejected);
  epoch.Set(static_cast<double>(info.epoch));
  ready.Set(info.state == EngineState::kReady ? 1 : 0);
  if (info.num_kv_blocks > 0) {
    Labels labels = cache_labels;
    labels["num_gpu_blocks"] = absl::StrCat(info.num_kv_blocks);
    cache_config.Add(labels).Set(1);
  }
}

void Metrics::Impl::ExposeRanks(const EngineInfo& info) {
  for (const RankReport& report : info.ranks) {
    const std::string rank = absl::StrCat(report.rank);
    worker_up.Add({{"rank", rank}}).Set(info.whole ? 1 : 0);
    weight_bytes.Add({{"rank", rank}}).Set(static_cast<double>(report.memory.weights));
    kv_bytes.Add({{"rank", rank}}).Set(static_cast<double>(report.memory.kv));
    SetParts(rank, report.memory, &memory_bytes);
    if (report.predicted) {
      predicted_weight_bytes.Add({{"rank", rank}})
          .Set(static_cast<double>(report.predicted->weights));
      SetParts(rank, *report.predicted, &predicted_memory_bytes);
    }
    for (const auto& [phase, seconds] : report.phases) {
      load_phase.Add({{"rank", rank}, {"phase", phase}}).Set(seconds);
    }
  }
}

void Metrics::WatchDevices(GroupWatch* watch) {
  const std::lock_guard lock(impl_->scrape);
  impl_->watch = watch;
}

std::string Metrics::Expose(const EngineInfo& info, const SchedulerStats& stats) {
  const std::lock_guard lock(impl_->scrape);
  impl_->ExposeEngine(info, stats);
  impl_->ExposeRanks(info);
  if (impl_->watch != nullptr) impl_->devices.Set(impl_->watch->Devices());
  return prometheus::TextSerializer().Serialize(impl_->registry.Collect());
}

}  // namespace lockstep
