// Speed of the layers of a decode step of an 8B or 70B Llama as one graph: what the kernels
// cost among each other, without exchanges between GPUs, embedding, head and sampling.
//
//   bench_layers [rows [tp [70b] [fp8] [cluster] [ahead] [stack]]]   us a layer; defaults 1 1
//
// tp cuts the shapes as for one rank of so many. 70b: 32 of its layers, to fit. cluster: products
// of several rows by kernels/skinny_cluster.h; else by kernels/gemv.h, whatever their K. x of fp8
// is then quantised by the norms, and else by its product, or, ahead, by the kernels before. stack:
// one row by kernels/row_stack.h, with a head of next to no rows.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/activation.h"
#include "kernels/attention_decode.h"
#include "kernels/gemv.h"
#include "kernels/norm.h"
#include "kernels/quantize.h"
#include "kernels/row_stack.h"
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

constexpr int kHeadDim = 128, kLayers = 32, kContext = 1100, kBlockSize = 16;

// Small numbers of either sign, as bf16 or as e4m3.
__global__ void FillKernel(uint32_t* out, size_t words, uint32_t mask, uint32_t bits) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < words;
       i += size_t{gridDim.x} * blockDim.x) {
    uint64_t v = (i + 1) * 0x9e3779b97f4a7c15ull;
    v ^= v >> 29;
    v *= 0xbf58476d1ce4e5b9ull;
    out[i] = (static_cast<uint32_t>(v >> 32) & mask) | bits;
  }
}

class Layers {
 public:
  Layers(int rows, int tp, bool large, bool fp8, bool cluster, bool ahead, bool stack)
      : rows_(rows),
        fp8_(fp8),
        cluster_(cluster),
        ahead_(ahead),
        stack_(stack),
        hidden_(large ? 8192 : 4096),
        heads_((large ? 64 : 32) / tp),
        kv_heads_(8 / tp),
        mlp_((large ? 28672 : 14336) / tp) {
    CHECK_CUDA(InitGemv());
    CHECK_CUDA(InitSkinnyCluster());
    CHECK_CUDA(InitDecodeAttention());
    CHECK_CUDA(InitRowStack());
    CHECK_CUDA(cudaStreamCreate(&stream_));
    layer_bytes_ = Bytes(qkv_width(), hidden_) + Bytes(hidden_, q_width()) +
                   Bytes(2 * mlp_, hidden_) + Bytes(hidden_, mlp_);
    weights_ = Take<char>(kLayers * layer_bytes_);
    FillKernel<<<1024, 256, 0, stream_>>>(reinterpret_cast<uint32_t*>(weights_),
                                          kLayers * layer_bytes_ / 4,
                                          fp8 ? 0xb7b7b7b7u : 0x80ff80ffu, fp8 ? 0u : 0x3c003c00u);
    const int blocks = (kContext + kBlockSize) / kBlockSize + 1;
    const size_t half = size_t{2} * rows * blocks * kBlockSize * kv_heads_ * kHeadDim;
    kv_ = Take<char>(kLayers * 2 * half);
    kv_half_ = half;
    std::vector<int32_t> slots(rows), positions(rows, kContext), table(rows * blocks);
    for (int r = 0; r < rows; ++r) slots[r] = r;
    for (int i = 0; i < rows * blocks; ++i) table[i] = i;
    step_.slot = Upload(slots);
    step_.position = Upload(positions);
    step_.block_table = Upload(table);
    step_.table_stride = blocks;
    rotary_ = Take<float2>(size_t{2048} * kHeadDim / 2);
    ones_ = Upload(std::vector<uint16_t>(hidden_, 0x3f80));
    scales_ = Upload(std::vector<float>(65536, 1e-3f));
    for (char** buffer :
         {&qkv_, &out_, &residual_, &other_, &normed_, &up_, &activated_, &partial_})
      *buffer = Take<char>(size_t{2} * std::max(rows, 16) * 65536);
    quantized_ = Take<char>(size_t{64} * 32768);
    quantized_scales_ = Take<float>(64);
    workspace_ = Take<char>(DecodeAttentionWorkspaceBytes(heads_, kv_heads_, kHeadDim, rows, 2048));
    exchange_.peers.base[0] =
        reinterpret_cast<std::byte*>(Take<char>(GemvExchangeBytes(1, hidden_)));
    exchange_.width = hidden_;
    CHECK_CUDA(ClearGemvExchange(exchange_, stream_));
    if (stack_) PrepareStack();
    CHECK_CUDA(cudaStreamSynchronize(stream_));
  }

  double MicrosecondsPerLayer() {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    CHECK_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    if (stack_) {
      CHECK_CUDA(RowStack(launch(), stack_args_));
    } else {
      for (int layer = 0; layer < kLayers; ++layer) rows_ == 1 ? OneRow(layer) : Rows(layer);
    }
    CHECK_CUDA(cudaStreamEndCapture(stream_, &graph));
    CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t begin = nullptr, end = nullptr;
    CHECK_CUDA(cudaEventCreate(&begin));
    CHECK_CUDA(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < 25; ++i) {
      CHECK_CUDA(cudaEventRecord(begin, stream_));
      CHECK_CUDA(cudaGraphLaunch(exec, stream_));
      CHECK_CUDA(cudaEventRecord(end, stream_));
      CHECK_CUDA(cudaEventSynchronize(end));
      float ms = 0;
      CHECK_CUDA(cudaEventElapsedTime(&ms, begin, end));
      if (i >= 5) times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1e3 / kLayers;
  }
  double layer_bytes() const { return static_cast<double>(layer_bytes_); }

 private:
  int q_width() const { return heads_ * kHeadDim; }
  int qkv_width() const { return (heads_ + 2 * kv_heads_) * kHeadDim; }
  size_t Bytes(int n, int k) const { return size_t{1} * n * k * (fp8_ ? 1 : 2); }
  const char* Qkv(int layer) const { return weights_ + layer * layer_bytes_; }
  const char* O(int layer) const { return Qkv(layer) + Bytes(qkv_width(), hidden_); }
  const char* Up(int layer) const { return O(layer) + Bytes(hidden_, q_width()); }
  const char* Down(int layer) const { return Up(layer) + Bytes(2 * mlp_, hidden_); }

  template <typename T>
  T* Take(size_t count) {
    void* memory = nullptr;
    CHECK_CUDA(cudaMalloc(&memory, std::max<size_t>(count * sizeof(T), 256)));
    CHECK_CUDA(cudaMemset(memory, 0, count * sizeof(T)));
    return static_cast<T*>(memory);
  }
  template <typename T>
  T* Upload(const std::vector<T>& values) {
    T* memory = Take<T>(values.size());
    CHECK_CUDA(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyDefault));
    return memory;
  }

  KvLayer Kv(int layer) const {
    return {.k = kv_ + 2 * layer * kv_half_,
            .v = kv_ + (2 * layer + 1) * kv_half_,
            .kv_heads = kv_heads_,
            .block_size = kBlockSize,
            .head_dim = kHeadDim};
  }
  void PrepareStack() {
    for (int layer = 0; layer < kLayers; ++layer) {
      stack_layers_.push_back({.qkv = {Qkv(layer), scales_},
                               .o = {O(layer), scales_},
                               .gate_up = {Up(layer), scales_},
                               .down = {Down(layer), scales_},
                               .attention_norm = ones_,
                               .mlp_norm = ones_,
                               .kv = Kv(layer),
                               .rotary = rotary_,
                               .scale = 0.088f});
    }
    RowStackArgs& args = stack_args_;
    args.weight_type = fp8_ ? Type::kE4M3 : Type::kBF16;
    args.hidden = hidden_;
    args.heads = heads_;
    args.intermediate = mlp_;
    args.vocab = 132;
    args.layers = stack_layers_.data();
    args.num_layers = kLayers;
    args.final_norm = ones_;
    args.head = Take<char>(size_t{2} * args.vocab * hidden_);
    args.rows = step_;
    args.residual = residual_;
    args.logits = Take<float>(args.vocab);
    args.exchange = &exchange_;
    args.workspace = Take<char>(RowStackBytes(args));
    CHECK_CUDA(ClearRowStack(args, stream_));
  }

  void Attention(int layer) {
    DecodeAttentionArgs args;
    args.num_rows = rows_;
    args.rows = step_;
    args.kv = Kv(layer);
    args.heads = heads_;
    args.q = qkv_;
    args.q_stride = qkv_width();
    args.out = out_;
    args.out_stride = q_width();
    args.scale = 0.088f;
    args.max_context = 2048;
    args.workspace = workspace_;
    args.history_ready = true;
    args.fresh_k = qkv_ + 2 * q_width();
    args.fresh_v = qkv_ + 2 * (q_width() + kv_heads_ * kHeadDim);
    args.rotary = rotary_;
    CHECK_CUDA(DecodeAttention(launch(), args));
  }
  GemvArgs Product(const void* weights, int n, int k, const void* x, void* out) const {
    GemvArgs args;
    args.weights = weights;
    args.weight_type = fp8_ ? Type::kE4M3 : Type::kBF16;
    args.scales = fp8_ ? scales_ : nullptr;
    args.n = n;
    args.k = k;
    args.m = rows_;
    args.x = x;
    args.out = out;
    return args;
  }
  void Push(GemvArgs args) {
    args.epilogue = GemvEpilogue::kPush;
    args.exchange = &exchange_;
    args.exchange_number = number_;
    CHECK_CUDA(Gemv(launch(), args));
  }
  void Reduce(GemvArgs args) {
    args.prologue = GemvPrologue::kReduce;
    args.exchange = &exchange_;
    args.exchange_number = number_++;
    args.norm_weight = ones_;
    args.residual_in = residual_;
    args.residual_out = other_;
    std::swap(residual_, other_);
    CHECK_CUDA(Gemv(launch(), args));
  }
  void OneRow(int layer) {
    Attention(layer);
    Push(Product(O(layer), hidden_, q_width(), out_, nullptr));
    GemvArgs up = Product(Up(layer), 2 * mlp_, hidden_, nullptr, activated_);
    up.epilogue = GemvEpilogue::kSiluGate;
    Reduce(up);
    Push(Product(Down(layer), hidden_, mlp_, activated_, nullptr));
    Reduce(Product(Qkv(layer), qkv_width(), hidden_, nullptr, qkv_));
  }

  void Run(GemvArgs args) {
    if (!cluster_) {
      CHECK_CUDA(Gemv(launch(), args));
      return;
    }
    SkinnyClusterArgs c;
    c.weights = args.weights;
    c.type = args.weight_type;
    c.n = args.n;
    c.k = args.k;
    c.m = args.m;
    c.x = args.x;
    c.epilogue = args.epilogue;
    c.out = args.out;
    c.weight_scales = fp8_ ? scales_ : nullptr;
    if (fp8_ && (args.x == normed_ || ahead_ || !SkinnyClusterSupports(c))) {
      if (args.x != normed_ && (args.x == out_ || !ahead_)) {
        CHECK_CUDA(QuantizeRows(launch(), {.num_rows = rows_,
                                           .width = args.k,
                                           .in = args.x,
                                           .in_stride = args.k,
                                           .out = quantized_,
                                           .out_stride = args.k,
                                           .scales = quantized_scales_}));
      }
      c.x_scales = quantized_scales_;
      c.x = quantized_;
    }
    CHECK_CUDA(SkinnyCluster(launch(), c));
  }
  QuantizedRows Quantized() const {
    return fp8_ && cluster_ ? QuantizedRows{quantized_, quantized_scales_} : QuantizedRows{};
  }
  void Norm() {
    ReduceTailArgs args;
    args.num_rows = rows_;
    args.hidden = hidden_;
    args.x = partial_;
    args.residual_in = args.residual_out = residual_;
    args.next.kind = NormKind::kRms;
    args.next.weight = ones_;
    args.next.eps = 1e-5f;
    args.normed = normed_;
    args.quantized = Quantized();
    CHECK_CUDA(ReduceTail(launch(), args));
  }
  void Rows(int layer) {
    Attention(layer);
    Run(Product(O(layer), hidden_, q_width(), out_, partial_));
    Norm();
    GemvArgs up = Product(Up(layer), 2 * mlp_, hidden_, normed_, activated_);
    if (fp8_ && cluster_ && ahead_) {
      up.out = up_;
      Run(up);
      CHECK_CUDA(Activate(launch(), {.activation = Activation::kSilu,
                                     .layout = GateLayout::kInterleaved,
                                     .num_rows = rows_,
                                     .width = mlp_,
                                     .in = up_,
                                     .in_stride = 2 * mlp_,
                                     .out = activated_,
                                     .out_stride = mlp_,
                                     .quantized = Quantized()}));
    } else {
      up.epilogue = GemvEpilogue::kSiluGate;
      Run(up);
    }
    Run(Product(Down(layer), hidden_, mlp_, activated_, partial_));
    Norm();
    Run(Product(Qkv(layer), qkv_width(), hidden_, normed_, qkv_));
  }
  Launch launch() const { return {.stream = stream_, .pdl = true, .brief = true}; }

  const int rows_;
  const bool fp8_, cluster_, ahead_, stack_;
  const int hidden_, heads_, kv_heads_, mlp_;
  size_t layer_bytes_ = 0, kv_half_ = 0;
  cudaStream_t stream_ = nullptr;
  char *weights_ = nullptr, *kv_ = nullptr, *qkv_ = nullptr, *out_ = nullptr, *residual_ = nullptr,
       *other_ = nullptr, *normed_ = nullptr, *up_ = nullptr, *activated_ = nullptr,
       *partial_ = nullptr, *quantized_ = nullptr, *workspace_ = nullptr;
  float *quantized_scales_ = nullptr, *scales_ = nullptr;
  uint16_t* ones_ = nullptr;
  float2* rotary_ = nullptr;
  StepRows step_;
  GemvExchange exchange_;
  uint32_t number_ = 0;
  std::vector<StackLayer> stack_layers_;
  RowStackArgs stack_args_;
};

}  // namespace
}  // namespace lockstep::kernels

int main(int argc, char** argv) {
  const int rows = argc > 1 ? std::atoi(argv[1]) : 1, tp = argc > 2 ? std::atoi(argv[2]) : 1;
  bool large = false, fp8 = false, cluster = false, ahead = false, stack = false;
  for (int i = 3; i < argc; ++i) {
    large |= std::strcmp(argv[i], "70b") == 0;
    fp8 |= std::strcmp(argv[i], "fp8") == 0;
    cluster |= std::strcmp(argv[i], "cluster") == 0;
    ahead |= std::strcmp(argv[i], "ahead") == 0;
    stack |= std::strcmp(argv[i], "stack") == 0;
  }
  if (rows < 1 || rows > 64 || (stack && rows > 1) || (tp != 1 && tp != 2 && tp != 4)) {
    std::fprintf(
        stderr,
        "usage: bench_layers [rows 1..64 [tp 1|2|4 [70b] [fp8] [cluster] [ahead] [stack]]]\n");
    return 2;
  }
  lockstep::kernels::Layers layers(rows, tp, large, fp8, cluster, ahead, stack);
  const double us = layers.MicrosecondsPerLayer();
  std::printf("%s, %2d rows, 1/%d%s%s%s%s: %6.2f us a layer, weights at %4.0f GB/s\n",
              large ? "70B" : "8B", rows, tp, fp8 ? ", fp8" : "", cluster ? ", cluster" : "",
              ahead ? ", ahead" : "", stack ? ", stack" : "", us, layers.layer_bytes() / us * 1e-3);
  return 0;
}
