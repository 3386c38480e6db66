// What sampling costs a step: all phases of one rank (of tp = 1, so without the
// exchanges) in a graph, with programmatic dependent launch. The floor is the
// logits read once by the greedy path, at the bandwidth of whatever holds them.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels/sample.h"

namespace lockstep::kernels {
namespace {

void Require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

template <typename T>
T* Allocate(size_t count) {
  void* at = nullptr;
  Require(cudaMalloc(&at, count * sizeof(T)), "cudaMalloc");
  Require(cudaMemset(at, 0, count * sizeof(T)), "cudaMemset");
  return static_cast<T*>(at);
}

template <typename T>
T* Upload(const std::vector<T>& values) {
  T* at = Allocate<T>(values.size());
  Require(cudaMemcpy(at, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
  return at;
}

struct Case {
  const char* name;
  SlotParams params;
};

std::vector<Case> Cases() {
  std::vector<Case> cases(7);
  cases[0].name = "greedy";
  cases[1].name = "temperature";
  cases[2].name = "top_p 0.9";
  cases[3].name = "top_k 50";
  cases[4].name = "nested";
  cases[5].name = "penalties";
  cases[6].name = "greedy+logprobs";
  for (int i = 1; i < 6; ++i) cases[i].params.temperature = 1.0f;
  cases[2].params.top_p = 0.9f;
  cases[3].params.top_k = 50;
  cases[4].params.top_p = 0.9f;
  cases[4].params.top_k = 50;
  cases[5].params.repetition_penalty = 1.1f;
  cases[6].params.logprobs = 20;
  return cases;
}

class Bench {
 public:
  Bench(int rows, int columns, const float* logits) {
    const size_t n = static_cast<size_t>(rows);
    args_.rows = rows;
    args_.columns = columns;
    args_.logits = logits;
    args_.logits_stride = columns;
    std::vector<int32_t> slots(n);
    for (int i = 0; i < rows; ++i) slots[i] = i;
    args_.slot = Upload(slots);
    args_.position = Upload(std::vector<int32_t>(n, 5));
    args_.bias_ids = Allocate<int32_t>(n * kMaxBias);
    args_.bias_values = Allocate<float>(n * kMaxBias);
    args_.ending_ids = Allocate<int32_t>(n * kMaxEndingIds);
    args_.counts_stride = columns + columns % 2;
    args_.counts = Allocate<uint16_t>(n * static_cast<size_t>(args_.counts_stride));
    args_.tokens_stride = 16;
    args_.tokens = Allocate<int32_t>(n * 16);
    args_.poisoned = Allocate<uint32_t>(n);
    args_.results = Allocate<SampledRow>(n);
    args_.logprobs = Allocate<RowLogprobs>(n);
    for (const SamplePhase phase : kSamplePhases) {
      args_.send[phase] = args_.gathered[phase] =
          Allocate<char>(n * SampleExchangeBytes(phase) + 1);
    }
    const SampleNeeds all = {true, true, true, true, true, true};
    args_.workspace = Allocate<char>(SampleWorkspaceBytes(all, rows, columns));
    Require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
  }
  ~Bench() {
    for (const void* at :
         {static_cast<const void*>(args_.slot), static_cast<const void*>(args_.position),
          static_cast<const void*>(args_.bias_ids), static_cast<const void*>(args_.bias_values),
          static_cast<const void*>(args_.ending_ids), static_cast<const void*>(args_.counts),
          static_cast<const void*>(args_.tokens), static_cast<const void*>(args_.poisoned),
          static_cast<const void*>(args_.results), static_cast<const void*>(args_.logprobs),
          static_cast<const void*>(args_.workspace)}) {
      cudaFree(const_cast<void*>(at));
    }
    for (void* at : args_.send) cudaFree(at);
    cudaStreamDestroy(stream_);
  }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  // Microseconds a batch.
  double Run(const SlotParams& params) {
    Use(params);
    const double us = Time([&] {
      for (const SamplePhase phase : kSamplePhases) Enqueue(phase);
    });
    cudaFree(const_cast<SlotParams*>(args_.params));
    return us;
  }

  // Microseconds of each phase, repeated in its place. 0: not of this batch.
  std::vector<double> RunPhases(const SlotParams& params) {
    Use(params);
    std::vector<double> us;
    for (const SamplePhase phase : kSamplePhases) {
      us.push_back(HasPhase(args_.needs, phase) ? Time([&] { Enqueue(phase); }) : 0.0);
    }
    cudaFree(const_cast<SlotParams*>(args_.params));
    return us;
  }

 private:
  void Use(const SlotParams& params) {
    args_.params = Upload(std::vector<SlotParams>(static_cast<size_t>(args_.rows), params));
    args_.needs = NeedsOf(params);
    Require(cudaDeviceSynchronize(), "upload");
  }

  void Enqueue(SamplePhase phase) {
    if (HasPhase(args_.needs, phase))
      Require(RunSamplePhase({stream_, true}, phase, args_), "launch");
  }

  template <typename F>
  double Time(F enqueue) {
    constexpr int kBatches = 20, kLaunches = 10;
    Require(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    for (int i = 0; i < kBatches; ++i) enqueue();
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    Require(cudaStreamEndCapture(stream_, &graph), "end of capture");
    Require(cudaGraphInstantiate(&exec, graph, 0), "graph");
    cudaEvent_t begin, end;
    Require(cudaEventCreate(&begin), "event");
    Require(cudaEventCreate(&end), "event");
    double best = 1e30;
    for (int i = 0; i < kLaunches; ++i) {
      Require(cudaEventRecord(begin, stream_), "record");
      Require(cudaGraphLaunch(exec, stream_), "graph launch");
      Require(cudaEventRecord(end, stream_), "record");
      Require(cudaStreamSynchronize(stream_), "run");
      float ms = 0.0f;
      Require(cudaEventElapsedTime(&ms, begin, end), "elapsed");
      if (i > 1) best = ms < best ? ms : best;
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
    return best * 1e3 / kBatches;
  }

  SampleArgs args_;
  cudaStream_t stream_ = nullptr;
};

int Main() {
  constexpr int kMostRows = 256, kMostColumns = 128256;
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> some(1 << 20);
  for (float& v : some) v = normal(generator);
  float* logits = Allocate<float>(size_t{kMostRows} * kMostColumns + some.size());
  for (size_t at = 0; at < size_t{kMostRows} * kMostColumns; at += some.size()) {
    Require(
        cudaMemcpy(logits + at, some.data(), some.size() * sizeof(float), cudaMemcpyHostToDevice),
        "copy");
  }
  std::printf("%7s %5s", "columns", "rows");
  for (const Case& c : Cases()) std::printf(" %15s", c.name);
  std::printf("  us a batch\n");
  for (const int columns : {32064, 128256}) {
    for (const int rows : {1, 8, 64, 256}) {
      Bench bench(rows, columns, logits);
      std::printf("%7d %5d", columns, rows);
      for (const Case& c : Cases()) {
        std::printf(" %15.2f", bench.Run(c.params));
      }
      const double us = bench.Run(Cases()[0].params);
      std::printf("  greedy %.0f GB/s\n", 4e-3 * rows * columns / us);
      for (const int c : {2, 4, 6}) {
        std::printf("%30s", Cases()[c].name);
        for (const double phase_us : bench.RunPhases(Cases()[c].params))
          std::printf(" %6.2f", phase_us);
        std::printf("  us by phase\n");
      }
    }
  }
  cudaFree(logits);
  return 0;
}

}  // namespace
}  // namespace lockstep::kernels

int main() { return lockstep::kernels::Main(); }
