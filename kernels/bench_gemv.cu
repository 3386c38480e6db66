// Speed of the decode products: launches in a CUDA graph, dependent on each other,
// over so many copies of the weights that no cache helps.
//
//   bench_gemv              GB/s of weights by shape and rows
//   bench_gemv fp8          the same of e4m3 weights
//   bench_gemv cluster [fp8]  of 16, 32 and 64 rows in clusters (kernels/skinny_cluster.h)
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/gemv.h"
#include "kernels/skinny_cluster.h"

namespace lockstep::kernels {
namespace {

#define CHECK_CUDA(expression)                                                       \
  do {                                                                               \
    const cudaError_t cuda_error = (expression);                                     \
    if (cuda_error != cudaSuccess) {                                                 \
      std::fprintf(stderr, "%s: %s\n", #expression, cudaGetErrorString(cuda_error)); \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

struct Shape {
  int n, k;
  GemvEpilogue epilogue;
  const char* what;
};
constexpr Shape kShapes[] = {
    {1536, 4096, GemvEpilogue::kStore, "8B qkv /4"},
    {3072, 4096, GemvEpilogue::kStore, "8B qkv /2"},
    {6144, 4096, GemvEpilogue::kStore, "8B qkv"},
    {4096, 1024, GemvEpilogue::kStore, "8B o /4"},
    {4096, 2048, GemvEpilogue::kStore, "8B o /2"},
    {4096, 4096, GemvEpilogue::kStore, "8B o"},
    {7168, 4096, GemvEpilogue::kSiluGate, "8B gate up /4"},
    {14336, 4096, GemvEpilogue::kSiluGate, "8B gate up /2"},
    {28672, 4096, GemvEpilogue::kSiluGate, "8B gate up"},
    {4096, 3584, GemvEpilogue::kStore, "8B down /4"},
    {4096, 7168, GemvEpilogue::kStore, "8B down /2"},
    {4096, 14336, GemvEpilogue::kStore, "8B down"},
    {32064, 4096, GemvEpilogue::kLogits, "8B head /4"},
    {128256, 4096, GemvEpilogue::kLogits, "8B head"},
    {2560, 8192, GemvEpilogue::kStore, "70B qkv /4"},
    {8192, 2048, GemvEpilogue::kStore, "70B o /4"},
    {14336, 8192, GemvEpilogue::kSiluGate, "70B gate up /4"},
    {8192, 7168, GemvEpilogue::kStore, "70B down /4"},
    {8192, 28672, GemvEpilogue::kStore, "70B down"},
};

__global__ void FillKernel(uint32_t* out, size_t words, bool fp8) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < words;
       i += size_t{gridDim.x} * blockDim.x) {
    uint64_t v = (i + 1) * 0x9e3779b97f4a7c15ull;
    v ^= v >> 29;
    v *= 0xbf58476d1ce4e5b9ull;
    const uint32_t bits = static_cast<uint32_t>(v >> 32);
    // Small values of either sign, with random mantissas.
    out[i] = fp8 ? (bits & 0xb7b7b7b7u) : (bits & 0x80ff80ffu) | 0x3c003c00u;
  }
}

class Bench {
 public:
  explicit Bench(bool fp8) : fp8_(fp8) {
    CHECK_CUDA(InitGemv());
    CHECK_CUDA(InitSkinnyCluster());
    CHECK_CUDA(cudaMalloc(&weights_, kBytes));
    CHECK_CUDA(cudaMalloc(&x_, kSmall));
    CHECK_CUDA(cudaMalloc(&out_, kSmall));
    CHECK_CUDA(cudaMalloc(&keys_, kSmall));
    CHECK_CUDA(cudaMalloc(&scales_, kSmall));
    FillKernel<<<1024, 256>>>(static_cast<uint32_t*>(weights_), kBytes / 4, fp8);
    FillKernel<<<1024, 256>>>(static_cast<uint32_t*>(x_), kSmall / 4, false);
    CHECK_CUDA(cudaMemset(scales_, 0, kSmall));
    CHECK_CUDA(cudaStreamCreate(&stream_));
    CHECK_CUDA(cudaEventCreate(&begin_));
    CHECK_CUDA(cudaEventCreate(&end_));
  }

  GemvArgs Args(const Shape& shape, int m) const {
    GemvArgs args;
    args.weights = weights_;
    args.weight_type = fp8_ ? Type::kE4M3 : Type::kBF16;
    args.scales = fp8_ ? static_cast<const float*>(scales_) : nullptr;
    args.n = shape.n;
    args.k = shape.k;
    args.m = m;
    args.x = x_;
    args.out = out_;
    args.epilogue = shape.epilogue;
    if (shape.epilogue == GemvEpilogue::kLogits) args.keys = static_cast<uint64_t*>(keys_);
    return args;
  }

  SkinnyClusterArgs ClusterArgs(const Shape& shape, int m, int split) const {
    SkinnyClusterArgs args;
    args.weights = weights_;
    args.type = fp8_ ? Type::kE4M3 : Type::kBF16;
    args.n = shape.n;
    args.k = shape.k;
    args.m = m;
    args.x = x_;
    if (fp8_) args.weight_scales = args.x_scales = static_cast<const float*>(scales_);
    args.out = out_;
    // Over e4m3 the gate is left to the kernel that quantises.
    args.epilogue = fp8_ && IsGate(shape.epilogue) ? GemvEpilogue::kStore : shape.epilogue;
    args.split = split;
    return args;
  }

  // Microseconds a launch of `run(launch, weights)`.
  template <typename Run>
  double Time(size_t bytes, Run run) {
    const size_t step = (bytes + 255) / 256 * 256;
    const int copies = static_cast<int>(std::max<size_t>(1, kBytes / step));
    const int launches = std::clamp(static_cast<int>((size_t{1} << 30) / bytes), 4, 200);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    CHECK_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < launches; ++i)
      CHECK_CUDA(run({stream_, true}, static_cast<const char*>(weights_) + step * (i % copies)));
    CHECK_CUDA(cudaStreamEndCapture(stream_, &graph));
    CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    std::vector<float> times;
    for (int i = 0; i < 6; ++i) {
      CHECK_CUDA(cudaEventRecord(begin_, stream_));
      CHECK_CUDA(cudaGraphLaunch(exec, stream_));
      CHECK_CUDA(cudaEventRecord(end_, stream_));
      CHECK_CUDA(cudaEventSynchronize(end_));
      float ms = 0;
      CHECK_CUDA(cudaEventElapsedTime(&ms, begin_, end_));
      if (i > 0) times.push_back(ms);
    }
    CHECK_CUDA(cudaGraphExecDestroy(exec));
    CHECK_CUDA(cudaGraphDestroy(graph));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1e3 / launches;
  }
  size_t Bytes(const Shape& shape) const {
    return size_t{static_cast<unsigned>(shape.n)} * shape.k * (fp8_ ? 1 : 2);
  }
  double Time(const Shape& shape, int m) {
    GemvArgs args = Args(shape, m);
    return Time(Bytes(shape), [&](const Launch& launch, const void* weights) {
      args.weights = weights;
      return Gemv(launch, args);
    });
  }
  // 0: it is not taken.
  double ClusterTime(const Shape& shape, int m, int split) {
    SkinnyClusterArgs args = ClusterArgs(shape, m, split);
    if (!SkinnyClusterSupports(args)) return 0;
    return Time(Bytes(shape), [&](const Launch& launch, const void* weights) {
      args.weights = weights;
      return SkinnyCluster(launch, args);
    });
  }

 private:
  static constexpr size_t kBytes = size_t{1200} << 20, kSmall = size_t{16} << 20;
  bool fp8_;
  void *weights_ = nullptr, *x_ = nullptr, *out_ = nullptr, *keys_ = nullptr, *scales_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

void Table(Bench& bench) {
  std::printf("%-15s %6s %6s  GB/s: M=1     2     4     8    16 | us: M=1  16\n", "", "N", "K");
  for (const Shape& shape : kShapes) {
    std::printf("%-15s %6d %6d      ", shape.what, shape.n, shape.k);
    double first = 0, last = 0;
    for (int m : {1, 2, 4, 8, 16}) {
      last = bench.Time(shape, m);
      if (m == 1) first = last;
      std::printf(" %5.0f", static_cast<double>(bench.Bytes(shape)) / last * 1e-3);
    }
    std::printf(" | %6.2f %6.2f\n", first, last);
    std::fflush(stdout);
  }
}

void ClusterTable(Bench& bench) {
  std::printf("us in clusters of so many blocks (*: the plan's choice), GB/s of weights\n");
  std::printf("%-15s %6s %6s", "", "N", "K");
  for (int m : {16, 32, 64}) std::printf(" | M=%-3d*      2      4      8 GB/s", m);
  std::printf("\n");
  for (const Shape& shape : kShapes) {
    std::printf("%-15s %6d %6d", shape.what, shape.n, shape.k);
    for (int m : {16, 32, 64}) {
      std::printf(" |");
      const double chosen = bench.ClusterTime(shape, m, 0);
      std::printf(" %6.2f", chosen);
      for (int split : {2, 4, 8}) std::printf(" %6.2f", bench.ClusterTime(shape, m, split));
      std::printf(" %4.0f",
                  chosen == 0 ? 0.0 : static_cast<double>(bench.Bytes(shape)) / chosen * 1e-3);
    }
    std::printf("\n");
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace lockstep::kernels

int main(int argc, char** argv) {
  bool fp8 = false, cluster = false;
  for (int i = 1; i < argc; ++i) {
    fp8 |= std::strcmp(argv[i], "fp8") == 0;
    cluster |= std::strcmp(argv[i], "cluster") == 0;
  }
  lockstep::kernels::Bench bench(fp8);
  cluster ? lockstep::kernels::ClusterTable(bench) : lockstep::kernels::Table(bench);
  return 0;
}
