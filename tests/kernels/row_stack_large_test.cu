// One kernel for a row's layers at the size of an 8B Llama, where its rings go round thousands
// of times a launch: whatever is read too early or too late changes bits. The same launch must
// give the same logits every time, and finite ones.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "kernels/row_stack.h"
#include "tests/kernels/gemv_case.cuh"

namespace lockstep::kernels {
namespace {

using testing::Memory;

constexpr int kHidden = 4096, kHeadDim = 128, kLayers = 4, kBlock = 16, kVocab = 32'000;
constexpr int kContext = 1'200;

__device__ uint32_t Noise(uint64_t v) {
  v = (v + 1) * 0x9e3779b97f4a7c15ull;
  v ^= v >> 29;
  v *= 0xbf58476d1ce4e5b9ull;
  return static_cast<uint32_t>(v >> 32);
}
// Numbers between -1 and 1 times `size`, as bf16 or as e4m3.
template <typename T>
__global__ void FillKernel(T* out, size_t count, float size, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x)
    out[i] = static_cast<T>((static_cast<int>(Noise(seed + i)) * 0x1p-31f) * size);
}

template <typename T>
std::unique_ptr<Memory> Filled(size_t count, float size, uint64_t seed) {
  auto memory = std::make_unique<Memory>(count * sizeof(T));
  FillKernel<<<512, 256>>>(memory->template get<T>(), count, size, seed);
  return memory;
}

template <typename W>
class Llama {
 public:
  // The shapes of one rank of `tp`; there are no other ranks.
  explicit Llama(int tp) : heads_(32 / tp), kv_heads_(8 / tp), mlp_(14'336 / tp) {
    EXPECT_CUDA(InitRowStack());
    const float size = 1.7f / 64;
    const auto matrix = [&](int n, int k) {
      const float factor = sizeof(W) == 1 ? 1.0f : size;
      owned_.push_back(Filled<W>(size_t{1} * n * k, factor, ++seed_ << 33));
      owned_.push_back(std::make_unique<Memory>(n * sizeof(float)));
      owned_.back()->Write(std::vector<float>(n, size));
      return StackMatrix{owned_[owned_.size() - 2]->template get<void>(),
                         owned_.back()->template get<float>()};
    };
    const auto vector = [&](size_t count, float around) {
      std::vector<__nv_bfloat16> values(count, __float2bfloat16(around));
      owned_.push_back(std::make_unique<Memory>(2 * count));
      owned_.back()->Write(values);
      return owned_.back()->template get<void>();
    };
    const void* const ones = vector(kHidden, 1.0f);
    const int blocks = kContext / kBlock, width = heads_ * kHeadDim;
    for (int l = 0; l < kLayers; ++l) {
      StackLayer layer = {.qkv = matrix(width + 2 * kv_heads_ * kHeadDim, kHidden),
                          .o = matrix(kHidden, width),
                          .gate_up = matrix(2 * mlp_, kHidden),
                          .down = matrix(kHidden, mlp_),
                          .attention_norm = ones,
                          .mlp_norm = ones,
                          .scale = 0.088f};
      layer.kv.kv_heads = kv_heads_;
      layer.kv.head_dim = kHeadDim;
      for (void** part : {&layer.kv.k, &layer.kv.v}) {
        owned_.push_back(Filled<__nv_bfloat16>(size_t{1} * blocks * kBlock * kv_heads_ * kHeadDim,
                                               1.0f, ++seed_ << 33));
        *part = owned_.back()->template get<void>();
      }
      layers_.push_back(layer);
    }
    owned_.push_back(Filled<__nv_bfloat16>(kHidden, 1.0f, ++seed_ << 33));
    args_.residual = owned_.back()->template get<void>();
    owned_.push_back(Filled<__nv_bfloat16>(size_t{kVocab} * kHidden, size, ++seed_ << 33));
    args_.head = owned_.back()->template get<void>();
    std::vector<int32_t> rows = {0, kContext - 100};  // slot, position, table
    for (int i = 0; i < blocks; ++i) rows.push_back((i * 7 + 3) % blocks);
    owned_.push_back(std::make_unique<Memory>(rows.size() * sizeof(int32_t)));
    owned_.back()->Write(rows);
    const int32_t* const at = owned_.back()->template get<int32_t>();
    args_.rows = {.slot = at, .position = at + 1, .block_table = at + 2, .table_stride = blocks};
    region_ = std::make_unique<Memory>(GemvExchangeBytes(1, kHidden));
    exchange_.peers.base[0] = region_->get<std::byte>();
    exchange_.width = kHidden;
    EXPECT_CUDA(ClearGemvExchange(exchange_, nullptr));
    logits_ = std::make_unique<Memory>(kVocab * sizeof(float));
    args_.weight_type = sizeof(W) == 1 ? Type::kE4M3 : Type::kBF16;
    args_.hidden = kHidden;
    args_.heads = heads_;
    args_.intermediate = mlp_;
    args_.vocab = kVocab;
    args_.layers = layers_.data();
    args_.num_layers = kLayers;
    args_.final_norm = ones;
    args_.logits = logits_->get<float>();
    args_.exchange = &exchange_;
    workspace_ = std::make_unique<Memory>(RowStackBytes(args_));
    args_.workspace = workspace_->get<void>();
    EXPECT_CUDA(ClearRowStack(args_, nullptr));
    EXPECT_CUDA(cudaDeviceSynchronize());
  }

  std::vector<float> Logits() {
    EXPECT_CUDA(RowStack({}, args_));
    EXPECT_CUDA(cudaDeviceSynchronize());
    return logits_->Read<float>();
  }
  bool GuardsIntact() const {
    return logits_->GuardsIntact() && workspace_->GuardsIntact() && region_->GuardsIntact();
  }

 private:
  const int heads_, kv_heads_, mlp_;
  uint64_t seed_ = 0;
  std::vector<std::unique_ptr<Memory>> owned_;
  std::vector<StackLayer> layers_;
  GemvExchange exchange_;
  std::unique_ptr<Memory> region_, logits_, workspace_;
  RowStackArgs args_;
};

class RowStackLargeTest : public ::testing::TestWithParam<int> {};

template <typename W>
void CheckRepeats(int tp) {
  Llama<W> llama(tp);
  const std::vector<float> first = llama.Logits();
  EXPECT_TRUE(std::all_of(first.begin(), first.end(), [](float v) { return std::isfinite(v); }));
  const auto [low, high] = std::minmax_element(first.begin(), first.end());
  EXPECT_GT(*high - *low, 0.1f);
  for (int i = 0; i < (testing::SanitizerRun() ? 1 : 2'000); ++i)
    ASSERT_EQ(llama.Logits(), first) << "launch " << i;
  EXPECT_TRUE(llama.GuardsIntact());
}

TEST_P(RowStackLargeTest, GivesTheSameBitsEveryTime) { CheckRepeats<__nv_bfloat16>(GetParam()); }
TEST_P(RowStackLargeTest, GivesTheSameBitsEveryTimeFromFp8) {
  CheckRepeats<__nv_fp8_e4m3>(GetParam());
}
INSTANTIATE_TEST_SUITE_P(TpSizes, RowStackLargeTest, ::testing::Values(1, 2, 4),
                         [](const auto& info) { return "tp" + std::to_string(info.param); });

}  // namespace
}  // namespace lockstep::kernels
