// Decoding a model of more than 100 million parameters through the step
// executor: bytes of weights read for a token, over the time of a step, as a share
// of what a plain read of as many bytes reaches on the same threads.
//
//   bench_decode [threads...]        default: 1, and every processor
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "tests/fakes/thread_communicator.h"
#include "wire/plan_digest.h"
#include "worker/backend/backend.h"
#include "worker/backend/cpu/cpu_backend.h"
#include "worker/decoder.h"
#include "worker/step_executor.h"
#include "worker/weights.h"

namespace lockstep {
namespace {

ModelConfig BenchConfig() {
  ModelConfig c;
  c.architecture = "LlamaForCausalLM";
  c.vocab_size = 32000;
  c.hidden_size = c.embedding_dim = 1024;
  c.num_layers = 10;
  c.num_heads = 16;
  c.num_kv_heads = 8;
  c.head_dim = 64;
  c.intermediate_size = 2816;
  c.max_position_embeddings = 4096;
  c.attention_scale = 0.125;
  c.sliding_layers.assign(c.num_layers, false);
  return c;
}

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double Median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + static_cast<int64_t>(x.size() / 2), x.end());
  return x[x.size() / 2];
}

// Sums `bytes` of memory, dealt to the pool in pieces.
class PlainRead {
 public:
  explicit PlainRead(int64_t bytes) : bytes_(bytes / kPiece * kPiece) {
    words_ = static_cast<uint64_t*>(
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    madvise(words_, bytes_, MADV_HUGEPAGE);
    for (int64_t i = 0; i < bytes_ / 8; ++i) words_[i] = static_cast<uint64_t>(i);
  }
  ~PlainRead() { munmap(words_, bytes_); }

  double BytesPerSecond(ThreadPool& pool) {
    const auto start = std::chrono::steady_clock::now();
    std::atomic<uint64_t> total{0};
    pool.ParallelFor(bytes_ / kPiece, [&](int64_t piece, int) {
      const uint64_t* words = words_ + piece * (kPiece / 8);
      uint64_t sums[16] = {};
      for (int64_t i = 0; i < kPiece / 8; i += 16) {
        for (int j = 0; j < 16; ++j) sums[j] += words[i + j];
      }
      for (const uint64_t sum : sums) total.fetch_add(sum, std::memory_order_relaxed);
    });
    if (total.load() == 1) std::printf(" ");  // the sum is used
    return static_cast<double>(bytes_) / SecondsSince(start);
  }

 private:
  static constexpr int64_t kPiece = 1 << 20;
  const int64_t bytes_;
  uint64_t* words_;
};

class Decoding {
 public:
  Decoding(const ModelConfig& config, DType dtype, uint32_t batch, ThreadPool* pool)
      : batch_(batch), comms_(MakeThreadCommunicators(1)) {
    const ShardPlan plan = *MakeShardPlan(config, 1, 0);
    auto weights = *Weights::Dummy(plan, config, {.dtype = dtype, .progress = {}}, pool);
    // Every matrix is read for a token, but the embedding: one row of it is.
    bytes_per_step_ =
        weights->allocated_bytes() - config.vocab_size * config.embedding_dim * DTypeBytes(dtype);
    const uint32_t blocks = batch * kTable;
    auto backend = MakeCpuBackend(config, plan, std::move(weights),
                                  {.max_num_seqs = batch,
                                   .max_batched_tokens = 512,
                                   .max_model_len = kTable * 16,
                                   .block_size = 16,
                                   .num_kv_blocks = blocks},
                                  dtype, pool);
    decoder_ = std::make_unique<Decoder>(config, plan, *std::move(backend));
    if (!decoder_->Attach(comms_[0].get()).ok()) std::abort();
    executor_ = std::make_unique<StepExecutor>(
        ExecutorLimits{.max_num_seqs = batch,
                       .max_batched_tokens = 512,
                       .max_model_len = kTable * 16,
                       .block_size = 16,
                       .num_kv_blocks = blocks,
                       .vocab_size = static_cast<uint32_t>(config.vocab_size)},
        1, decoder_.get());
    Prefill();
  }

  int64_t bytes_per_step() const { return bytes_per_step_; }

  double StepSeconds() {
    const auto start = std::chrono::steady_clock::now();
    StepPlan plan{.epoch = 1,
                  .step = ++step_,
                  .digest = 0,
                  .finished_slots = {},
                  .new_sequences = {},
                  .grown_tables = {},
                  .spans = {}};
    Run(std::move(plan), 1);
    return SecondsSince(start);
  }

 private:
  static constexpr uint32_t kTable = 20;
  static constexpr uint32_t kPrompt = 32;

  void Prefill() {
    StepPlan plan{.epoch = 1,
                  .step = ++step_,
                  .digest = 0,
                  .finished_slots = {},
                  .new_sequences = {},
                  .grown_tables = {},
                  .spans = {}};
    for (uint32_t s = 0; s < batch_; ++s) {
      NewSequence sequence{Slot(s), std::vector<TokenId>(kPrompt, 7 + s), kPrompt, 0, {}, {}};
      sequence.sampling.temperature = 0.0f;
      for (uint32_t b = 0; b < kTable; ++b) sequence.block_ids.emplace_back(s * kTable + b);
      plan.new_sequences.push_back(sequence);
    }
    Run(std::move(plan), kPrompt);
  }

  void Run(StepPlan plan, uint32_t tokens) {
    PlanDigest digest(plan.epoch, plan.step);
    for (uint32_t s = 0; s < batch_; ++s) {
      digest.Add(Slot(s), computed_, tokens, kTable, true);
      plan.spans.push_back({Slot(s), tokens});
    }
    plan.digest = digest.value();
    const absl::StatusOr<StepResult> result = executor_->Run(plan, 0);
    if (!result.ok()) {
      std::fprintf(stderr, "bench_decode: %s\n", result.status().ToString().c_str());
      std::exit(1);
    }
    computed_ += tokens;
  }

  const uint32_t batch_;
  std::vector<std::unique_ptr<Communicator>> comms_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<StepExecutor> executor_;
  int64_t bytes_per_step_ = 0;
  uint64_t step_ = 0;
  uint32_t computed_ = 0;
};

void Bench(DType dtype, uint32_t batch, int threads) {
  ThreadPool pool(threads);
  const ModelConfig config = BenchConfig();
  Decoding decoding(config, dtype, batch, &pool);
  PlainRead read(decoding.bytes_per_step());
  // Step and read take turns, so that a busy machine slows both; the best of each
  // is what the machine can do, the medians what it did.
  std::vector<double> seconds, rates;
  for (int i = 0; i < 60; ++i) {
    seconds.push_back(decoding.StepSeconds());
    rates.push_back(read.BytesPerSecond(pool));
  }
  const double bytes = static_cast<double>(decoding.bytes_per_step());
  const double step = Median(seconds), best = *std::min_element(seconds.begin(), seconds.end());
  const double best_rate = *std::max_element(rates.begin(), rates.end());
  std::printf("%-9s %5u %7d  %7.1f MB %8.2f ms %8.1f %8.2f GB/s %8.2f GB/s %6.0f %% %6.0f %%\n",
              std::string(DTypeName(dtype)).c_str(), batch, threads, 1e-6 * bytes, 1e3 * step,
              batch / step, 1e-9 * bytes / step, 1e-9 * Median(rates),
              100 * bytes / step / Median(rates), 100 * bytes / best / best_rate);
}

int Main(int argc, char** argv) {
  std::vector<int> threads;
  for (int i = 1; i < argc; ++i) threads.push_back(std::max(1, std::atoi(argv[i])));
  if (threads.empty()) {
    threads = {1};
    if (std::thread::hardware_concurrency() > 1) {
      threads.push_back(static_cast<int>(std::thread::hardware_concurrency()));
    }
  }
  std::printf(
      "dtype     batch threads  weights/step   ms/step  tokens/s   weights read   plain read  "
      "median   best\n");
  for (const int t : threads) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (const uint32_t batch : {1u, 8u}) Bench(dtype, batch, t);
    }
  }
  return 0;
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) { return lockstep::Main(argc, argv); }
