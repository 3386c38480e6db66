// Times the attention kernels: decode over caches that the L2 does not hold
// (every launch of a graph reads another layer's), with and without dependent
// launch, and prefill of one prompt. Prints microseconds a launch, and GB/s of
// KV read or TFLOP/s (causal half only). Arguments, in any order: decode or
// prefill alone; splits=N; ring=1, 2 or -1, tiles of a warp's ring; dealt=1, by a plan; ragged=N,
// all rows but each N-th have a sixteenth of the context; context=N, only that one; max=N, the
// bound on it; order=1, blocks of a sequence one after another; spread=GIB, layers as far apart as
// in a cache of that size; kv=fp8, decode from a cache of e4m3.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/attention_decode.h"
#include "kernels/attention_prefill.h"
#include "kernels/device.cuh"

namespace lockstep::kernels {
namespace {

#define CHECK_CUDA(call)                                                \
  do {                                                                  \
    const cudaError_t status = (call);                                  \
    if (status != cudaSuccess) {                                        \
      std::fprintf(stderr, "%s:%d %s: %s\n", __FILE__, __LINE__, #call, \
                   cudaGetErrorString(status));                         \
      std::exit(1);                                                     \
    }                                                                   \
  } while (0)

__global__ void FillRandom(__nv_bfloat16* to, int64_t count, uint32_t seed) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += step) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed;
    x ^= x >> 16;
    x *= 2246822519u;
    x ^= x >> 13;
    x *= 3266489917u;
    x ^= x >> 16;
    to[i] = __float2bfloat16_rn(static_cast<float>(x) * (4.0f / 4294967296.0f) - 2.0f);
  }
}

template <typename T>
T* Upload(const std::vector<T>& values) {
  T* to;
  CHECK_CUDA(cudaMalloc(&to, values.size() * sizeof(T)));
  CHECK_CUDA(cudaMemcpy(to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return to;
}
__nv_bfloat16* Random(int64_t count, uint32_t seed) {
  __nv_bfloat16* to;
  CHECK_CUDA(cudaMalloc(&to, count * 2));
  FillRandom<<<2048, 256>>>(to, count, seed);
  CHECK_CUDA(cudaGetLastError());
  return to;
}

// Microseconds of one of the `count` launches that `enqueue` makes.
template <typename Enqueue>
float Time(int count, int replays, Enqueue enqueue) {
  cudaStream_t stream;
  CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue(stream);
  CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  CHECK_CUDA(cudaGraphLaunch(exec, stream));
  CHECK_CUDA(cudaEventRecord(begin, stream));
  for (int i = 0; i < replays; ++i) CHECK_CUDA(cudaGraphLaunch(exec, stream));
  CHECK_CUDA(cudaEventRecord(end, stream));
  CHECK_CUDA(cudaStreamSynchronize(stream));
  float ms = 0.0f;
  CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
  CHECK_CUDA(cudaEventDestroy(begin));
  CHECK_CUDA(cudaEventDestroy(end));
  CHECK_CUDA(cudaGraphExecDestroy(exec));
  CHECK_CUDA(cudaGraphDestroy(graph));
  CHECK_CUDA(cudaStreamDestroy(stream));
  return ms * 1000.0f / static_cast<float>(count * replays);
}

struct Options {
  int splits = 0, context = 0, max_context = 131072, order = 0, spread = 0, ring = 0, dealt = 0,
      ragged = 0;
  bool decode = true, prefill = true, fp8 = false;
};

struct Shape {
  const char* name;
  int heads, kv_heads;
};
constexpr Shape kShapes[] = {
    {"8B tp1", 32, 8}, {"8B tp2", 16, 4}, {"8B tp4", 8, 2}, {"70B tp4", 16, 2}};
constexpr int kDim = 128, kBlock = 16;
constexpr int64_t kPoolBytes = int64_t{9} << 30;
int64_t PoolBytes(const Options& options) {
  return options.spread > 0 ? int64_t{options.spread} << 30 : kPoolBytes;
}

// Blocks of a sequence are scattered over its layer's cache.
std::vector<int32_t> Scattered(int slots, int per_slot, bool in_order = false) {
  std::vector<int32_t> table(static_cast<size_t>(slots) * per_slot);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
  if (in_order) return table;
  uint32_t state = 1;
  for (size_t i = table.size(); i > 1; --i) {
    state = state * 1664525u + 1013904223u;
    std::swap(table[i - 1], table[state % i]);
  }
  return table;
}

void BenchDecode(const Options& options, char* pool) {
  std::printf("decode, head_dim 128: us a launch and GB/s of KV\n%-8s %5s %6s %8s %16s %16s %16s\n",
              "shape", "batch", "ctx", "MB", "plain", "pdl", "pdl+history");
  __nv_bfloat16* q = Random(int64_t{512} * 6144, 1);
  __nv_bfloat16* out = Random(int64_t{512} * 6144, 2);
  void* workspace;
  CHECK_CUDA(cudaMalloc(&workspace, 32 << 20));
  CHECK_CUDA(cudaMemset(workspace, 0, 32 << 20));
  void* plan;
  CHECK_CUDA(cudaMalloc(&plan, DecodeAttentionPlanBytes()));
  for (const Shape& shape : kShapes) {
    for (const int context : {1024, 1104, 2048, 8192, 32768, 131072}) {
      for (const int batch : {1, 16, 64, 256, 512}) {
        const int per_slot = context / kBlock;
        const int64_t half =
            int64_t{batch} * per_slot * shape.kv_heads * kBlock * kDim * (options.fp8 ? 1 : 2);
        if (2 * half > PoolBytes(options) || (context > 32768 && batch > 1)) continue;
        if (options.context > 0 && context != options.context) continue;
        const int layers = options.spread > 0
                               ? 32
                               : static_cast<int>(std::min<int64_t>(32, kPoolBytes / (2 * half)));
        const int64_t stride = options.spread > 0 ? PoolBytes(options) / 64 : half;
        if (stride < half) continue;
        int32_t* table = Upload(Scattered(batch, per_slot, options.order != 0));
        std::vector<int32_t> slots(batch), positions(batch, context - 1);
        int64_t seen = 0;
        for (int i = 0; i < batch; ++i) {
          slots[i] = i;
          if (options.ragged > 0 && i % options.ragged != 0) positions[i] = context / 16 - 1;
          seen += positions[i] + 1;
        }
        const double bytes = 2.0 * static_cast<double>(half) * static_cast<double>(seen) /
                             (static_cast<double>(batch) * context);
        int32_t* slot = Upload(slots);
        int32_t* position = Upload(positions);
        DecodeAttentionArgs args;
        args.num_rows = batch;
        args.rows = {slot, position, table, per_slot};
        args.heads = shape.heads;
        args.q = q;
        args.q_stride = (shape.heads + 2 * shape.kv_heads) * kDim;
        args.out = out;
        args.out_stride = shape.heads * kDim;
        args.scale = 0.08f;
        args.max_context = options.max_context;
        args.ring = options.ring;
        if (options.dealt > 0) {
          args.kv = {nullptr,        nullptr, options.fp8 ? Type::kE4M3 : Type::kBF16,
                     shape.kv_heads, kBlock,  kDim};
          CHECK_CUDA(PlanDecodeAttention({}, args, plan));
          CHECK_CUDA(cudaDeviceSynchronize());
          args.plan = plan;
        }
        args.splits = options.splits;
        args.workspace = workspace;
        std::printf("%-8s %5d %6d %8.1f", shape.name, batch, context, bytes / 1e6);
        for (const int mode : {0, 1, 2}) {
          args.history_ready = mode == 2;
          const float us = Time(
              layers, 2 * half * layers > (int64_t{1} << 30) ? 3 : 10, [&](cudaStream_t stream) {
                for (int i = 0; i < layers; ++i) {
                  char* base = pool + int64_t{i} * 2 * stride;
                  args.kv = {base,           base + stride, options.fp8 ? Type::kE4M3 : Type::kBF16,
                             shape.kv_heads, kBlock,        kDim};
                  CHECK_CUDA(DecodeAttention({stream, mode > 0}, args));
                }
              });
          std::printf(" %8.2f %7.0f", us, bytes / us / 1e3);
        }
        std::printf("\n");
        CHECK_CUDA(cudaFree(table));
        CHECK_CUDA(cudaFree(slot));
        CHECK_CUDA(cudaFree(position));
      }
    }
  }
  CHECK_CUDA(cudaFree(q));
  CHECK_CUDA(cudaFree(out));
  CHECK_CUDA(cudaFree(workspace));
}

void BenchPrefill(const Options& options, char* pool) {
  std::printf("prefill of one prompt, head_dim 128\n%-8s %7s %-14s %10s %9s\n", "shape", "tokens",
              "cache", "us", "TFLOP/s");
  const struct {
    const char* name;
    Type type;
    bool widened;
  } caches[] = {{"bf16", Type::kBF16, false},
                {"e4m3, mma.sync", Type::kE4M3, false},
                {"e4m3, widened", Type::kE4M3, true}};
  for (const Shape& shape : kShapes) {
    for (const int tokens : {1024, 6144, 8192}) {
      const int blocks = tokens / kBlock, width = (shape.heads + 2 * shape.kv_heads) * kDim;
      __nv_bfloat16* q = Random(int64_t{tokens} * width, 1);
      __nv_bfloat16* out = Random(int64_t{tokens} * shape.heads * kDim, 2);
      int32_t* table = Upload(Scattered(1, blocks, options.order != 0));
      PrefillSpan* spans = Upload(std::vector<PrefillSpan>{{0, 0, 0, tokens}});
      const int64_t half = int64_t{blocks} * shape.kv_heads * kBlock * kDim * 2;
      PrefillAttentionArgs args;
      args.heads = shape.heads;
      args.spans = spans;
      args.num_spans = 1;
      args.max_count = tokens;
      args.block_table = table;
      args.table_stride = blocks;
      args.q = q;
      args.q_stride = width;
      args.out = out;
      args.out_stride = shape.heads * kDim;
      args.scale = 0.08f;
      int32_t* wide_table = Upload(std::vector<int32_t>(blocks, 0));
      for (const auto& cache : caches) {
        args.kv = {pool, pool + half, cache.type, shape.kv_heads, kBlock, kDim};
        args.scratch = {};
        if (cache.widened) {
          args.scratch = {pool + 2 * half, pool + 3 * half, wide_table, blocks};
        }
        const float us = Time(4, 5, [&](cudaStream_t stream) {
          for (int i = 0; i < 4; ++i) CHECK_CUDA(PrefillAttention({stream, false}, args));
        });
        const double flops = 2.0 * shape.heads * kDim * static_cast<double>(tokens) * (tokens + 1);
        std::printf("%-8s %7d %-14s %10.1f %9.1f\n", shape.name, tokens, cache.name, us,
                    flops / us / 1e6);
      }
      CHECK_CUDA(cudaFree(wide_table));
      CHECK_CUDA(cudaFree(q));
      CHECK_CUDA(cudaFree(out));
      CHECK_CUDA(cudaFree(table));
      CHECK_CUDA(cudaFree(spans));
    }
  }
}

void Main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "decode") == 0) options.prefill = false;
    if (std::strcmp(argv[i], "kv=fp8") == 0) options.fp8 = true;
    if (std::strcmp(argv[i], "prefill") == 0) options.decode = false;
    std::sscanf(argv[i], "splits=%d", &options.splits);
    std::sscanf(argv[i], "context=%d", &options.context);
    std::sscanf(argv[i], "max=%d", &options.max_context);
    std::sscanf(argv[i], "order=%d", &options.order);
    std::sscanf(argv[i], "spread=%d", &options.spread);
    std::sscanf(argv[i], "ring=%d", &options.ring);
    std::sscanf(argv[i], "dealt=%d", &options.dealt);
    std::sscanf(argv[i], "ragged=%d", &options.ragged);
  }
  CHECK_CUDA(InitDecodeAttention());
  CHECK_CUDA(InitPrefillAttention());
  char* pool = reinterpret_cast<char*>(Random(PoolBytes(options) / 2, 3));
  if (options.decode) BenchDecode(options, pool);
  if (options.prefill) BenchPrefill(options, pool);
  CHECK_CUDA(cudaFree(pool));
}

}  // namespace
}  // namespace lockstep::kernels

int main(int argc, char** argv) { lockstep::kernels::Main(argc, argv); }
