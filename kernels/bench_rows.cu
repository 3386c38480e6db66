// Times the row-wise kernels as a step runs them: many in one CUDA graph, each
// dependent on the one before (programmatic launches), so that a line says what
// one more of it costs. Prints microseconds and the bytes it must move a second.
//
//   bench_rows [norms | qkv | others]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "kernels/activation.h"
#include "kernels/embed.h"
#include "kernels/fill.h"
#include "kernels/norm.h"
#include "kernels/qkv_finish.h"
#include "kernels/quantize.h"

namespace lockstep::kernels {
namespace {

void Check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "bench_rows: %s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// Enqueues the i-th launch.
using Enqueue = std::function<cudaError_t(const Launch&, int)>;

// Microseconds a launch, the median of some graph launches.
double Time(int launches, const Enqueue& enqueue) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cudaEvent_t begin, end;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  Check(cudaEventCreate(&begin), "event");
  Check(cudaEventCreate(&end), "event");
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < launches; ++i) Check(enqueue({.stream = stream, .pdl = true}, i), "launch");
  Check(cudaStreamEndCapture(stream, &graph), "capture");
  Check(cudaGraphInstantiate(&exec, graph, 0), "graph");
  std::vector<float> times;
  for (int i = 0; i < 9; ++i) {
    Check(cudaEventRecord(begin, stream), "record");
    Check(cudaGraphLaunch(exec, stream), "graph launch");
    Check(cudaEventRecord(end, stream), "record");
    Check(cudaStreamSynchronize(stream), "run");
    float ms = 0;
    Check(cudaEventElapsedTime(&ms, begin, end), "time");
    if (i >= 2) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  Check(cudaGraphExecDestroy(exec), "graph");
  Check(cudaGraphDestroy(graph), "graph");
  Check(cudaStreamDestroy(stream), "stream");
  return 1e3 * times[times.size() / 2] / launches;
}

void Report(const std::string& what, double us, double bytes) {
  std::printf("%-44s %8.2f us %8.1f GB/s\n", what.c_str(), us, bytes / us * 1e-3);
}

char* Allocate(int64_t bytes) {
  void* memory = nullptr;
  Check(cudaMalloc(&memory, bytes), "memory");
  Check(cudaMemset(memory, 0, bytes), "memory");
  return static_cast<char*>(memory);
}

constexpr int kRows = 8192;
constexpr int64_t kBuffer = int64_t{1} << 30;

struct Buffers {
  char* a = Allocate(kBuffer);
  char* b = Allocate(kBuffer);
  char* c = Allocate(kBuffer);
  char* slot = Allocate(kRows * 4);
  char* position = Allocate(kRows * 4);
  char* table = Allocate(1 << 20);
  char* scales = Allocate(1 << 20);
};

void Norms(const Buffers& b, int hidden) {
  for (const int rows : {1, 4, 16, 32, 64, 128, 256, kRows}) {
    const double row_bytes = 2.0 * hidden * rows;
    const std::string shape = std::to_string(rows) + " x " + std::to_string(hidden);
    const int launches = rows > 1000 ? 20 : 200;
    ReduceTailArgs tail;
    tail.num_rows = rows;
    tail.hidden = hidden;
    tail.x = b.a;
    tail.residual_in = tail.residual_out = b.b;
    tail.normed = b.c;
    const auto run = [&](const Launch& launch, int i) {
      tail.next = {.kind = NormKind::kRms, .weight = b.a + (kBuffer / 2) + i * hidden * 2};
      return ReduceTail(launch, tail);
    };
    Report("tail bf16 " + shape, Time(launches, run), 4 * row_bytes);
    tail.quantized = {b.a + kBuffer / 4, reinterpret_cast<float*>(b.scales)};
    tail.normed = nullptr;
    Report("tail bf16 -> e4m3 " + shape, Time(launches, run), 3.5 * row_bytes);
    QuantizeRowsArgs quantize;
    quantize.num_rows = rows;
    quantize.width = hidden;
    quantize.in = b.a;
    quantize.in_stride = quantize.out_stride = hidden;
    quantize.out = b.c;
    quantize.scales = reinterpret_cast<float*>(b.scales);
    Report("quantize bf16 " + shape,
           Time(launches, [&](const Launch& l, int) { return QuantizeRows(l, quantize); }),
           1.5 * row_bytes);
  }
}

// Rows are positions of one sequence: each writes a place of the cache of its own.
void Qkv(const Buffers& b, int heads, int kv_heads) {
  std::vector<int32_t> count(kRows);
  for (int i = 0; i < kRows; ++i) count[i] = i;
  Check(cudaMemcpy(b.position, count.data(), kRows * 4, cudaMemcpyHostToDevice), "positions");
  Check(cudaMemcpy(b.table, count.data(), kRows / 16 * 4, cudaMemcpyHostToDevice), "blocks");
  for (const int rows : {1, 16, 64, 256, kRows}) {
    const int width = (heads + 2 * kv_heads) * 128;
    QkvFinishArgs args;
    args.num_rows = rows;
    args.rows = {reinterpret_cast<int32_t*>(b.slot), reinterpret_cast<int32_t*>(b.position),
                 reinterpret_cast<int32_t*>(b.table), 1024};
    args.heads = heads;
    args.qkv = b.a;
    args.qkv_stride = width;
    args.rotary = reinterpret_cast<float2*>(b.b);
    args.kv = {.k = b.c,
               .v = b.c + kBuffer / 2,
               .type = Type::kBF16,
               .kv_heads = kv_heads,
               .block_size = 16,
               .head_dim = 128};
    Report("qkv " + std::to_string(heads) + "/" + std::to_string(kv_heads) + " x " +
               std::to_string(rows),
           Time(rows > 1000 ? 20 : 200, [&](const Launch& l, int) { return QkvFinish(l, args); }),
           4.0 * width * rows);
  }
  Check(cudaMemset(b.position, 0, kRows * 4), "positions");
  Check(cudaMemset(b.table, 0, kRows / 16 * 4), "blocks");
}

void Others(const Buffers& b) {
  for (const int rows : {1, 64, 256, kRows}) {
    for (const GateLayout layout : {GateLayout::kHalves, GateLayout::kInterleaved}) {
      const int width = 14336;
      ActivateArgs args;
      args.layout = layout;
      args.num_rows = rows;
      args.width = width;
      args.in = b.a;
      args.in_stride = 2 * width;
      args.out = b.b;
      args.out_stride = width;
      Report(std::string("silu ") + (layout == GateLayout::kHalves ? "halves " : "pairs ") +
                 std::to_string(rows) + " x 14336",
             Time(20, [&](const Launch& l, int) { return Activate(l, args); }), 6.0 * width * rows);
      args.quantized = {b.b, reinterpret_cast<float*>(b.scales)};
      Report("  to e4m3", Time(20, [&](const Launch& l, int) { return Activate(l, args); }),
             5.0 * width * rows);
    }
    QuantizeRowsArgs quantize;
    quantize.num_rows = rows;
    quantize.width = 4096;
    quantize.in = b.a;
    quantize.in_stride = quantize.out_stride = 4096;
    quantize.out = b.b;
    quantize.scales = reinterpret_cast<float*>(b.scales);
    Report("quantize " + std::to_string(rows) + " x 4096",
           Time(20, [&](const Launch& l, int) { return QuantizeRows(l, quantize); }),
           3.0 * 4096 * rows);
    EmbedRowsArgs embed;
    embed.table = b.a;
    embed.local_vocab = 1;
    embed.dim = 4096;
    embed.tokens = reinterpret_cast<int32_t*>(b.table);
    embed.tokens_stride = 1;
    embed.rows = {.slot = reinterpret_cast<int32_t*>(b.slot),
                  .position = reinterpret_cast<int32_t*>(b.position)};
    embed.num_rows = rows;
    embed.out = b.b;
    Report("embed " + std::to_string(rows) + " x 4096",
           Time(20, [&](const Launch& l, int) { return EmbedRows(l, embed); }), 4.0 * 4096 * rows);
  }
  for (const Type type : {Type::kBF16, Type::kF32, Type::kE4M3}) {
    const int64_t bytes = static_cast<int64_t>(TypeBytes(type)), cols = 8192;
    const FillUniformArgs fill = {.type = type,
                                  .key = 1,
                                  .global_cols = cols,
                                  .rows = kBuffer / bytes / cols,
                                  .cols = cols,
                                  .out = b.a,
                                  .row_stride = cols};
    Report("fill of " + std::to_string(bytes) + " bytes an element, 1 GiB",
           Time(4, [&](const Launch& l, int) { return FillUniform(l, fill); }), kBuffer);
  }
  Report("constant, 1 GiB",
         Time(4, [&](const Launch& l,
                     int) { return FillConstant(l, Type::kBF16, b.a, kBuffer / 2, 1.0f); }),
         kBuffer);
  QuantizeRowsArgs quantize;
  quantize.num_rows = 65536;
  quantize.width = 8192;
  quantize.in = b.a;
  quantize.in_stride = quantize.out_stride = 8192;
  quantize.out = b.b;
  quantize.scales = reinterpret_cast<float*>(b.scales);
  Report("quantize weights, 1 GiB of bf16",
         Time(4, [&](const Launch& l, int) { return QuantizeRows(l, quantize); }), 1.5 * kBuffer);
}

}  // namespace
}  // namespace lockstep::kernels

int main(int argc, char** argv) {
  using namespace lockstep::kernels;
  const std::string only = argc > 1 ? argv[1] : "";
  const Buffers buffers;
  AppendTokensArgs nothing;  // the least a dependent launch costs
  nothing.tokens = reinterpret_cast<int32_t*>(buffers.table);
  nothing.tokens_stride = 1;
  nothing.slot = nothing.position = nothing.sampled = reinterpret_cast<int32_t*>(buffers.slot);
  nothing.count = 1;
  Report("one thread", Time(200, [&](const Launch& l, int) { return AppendTokens(l, nothing); }),
         0);
  if (only.empty() || only == "norms") {
    Norms(buffers, 4096);
    Norms(buffers, 8192);
  }
  if (only.empty() || only == "qkv") {
    Qkv(buffers, 32, 8);
    Qkv(buffers, 8, 2);
  }
  if (only.empty() || only == "others") Others(buffers);
  return 0;
}
