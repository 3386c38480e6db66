// One kernel for a row's layers at the size of an 8B Llama, where its rings go round thousands
// of times a launch: whatever is read too early or too late changes bits. The same launch must
// give the same logits every time, and near those of the same arithmetic in double.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "kernels/row_stack.h"
#include "tests/kernels/device_rows.h"
#include "tests/kernels/gemv_case.cuh"

namespace lockstep::kernels {
namespace {

using testing::Memory;

constexpr int kHidden = 4096, kHeadDim = 128, kLayers = 4, kBlock = 16;
constexpr int kVocab = 70'000;  // more rows a block than it sums up at a time
constexpr int kContext = 1'200, kPosition = 1'100;
constexpr float kSize = 1.7f / 64, kScale = 0.088f;

__host__ __device__ uint32_t Noise(uint64_t v) {
  v = (v + 1) * 0x9e3779b97f4a7c15ull;
  v ^= v >> 29;
  v *= 0xbf58476d1ce4e5b9ull;
  return static_cast<uint32_t>(v >> 32);
}
// Number i of a matrix: between -1 and 1 times `size`, as bf16 or as e4m3.
template <typename T>
__host__ __device__ T Number(uint64_t seed, uint64_t i, float size) {
  return static_cast<T>((static_cast<int>(Noise(seed + i)) * 0x1p-31f) * size);
}
template <typename T>
__global__ void FillKernel(T* out, size_t count, float size, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x)
    out[i] = Number<T>(seed, i, size);
}

template <typename T>
std::unique_ptr<Memory> Filled(size_t count, float size, uint64_t seed) {
  auto memory = std::make_unique<Memory>(count * sizeof(T));
  FillKernel<<<512, 256>>>(memory->template get<T>(), count, size, seed);
  return memory;
}

int TableOf(int block) { return (block * 7 + 3) % (kContext / kBlock); }

template <typename W>
class Llama {
 public:
  // The shapes of one rank of `tp`; there are no other ranks.
  explicit Llama(int tp) : heads_(32 / tp), kv_heads_(8 / tp), mlp_(14'336 / tp) {
    EXPECT_CUDA(InitRowStack());
    const auto matrix = [&](int n, int k) {
      const float factor = sizeof(W) == 1 ? 1.0f : kSize;
      owned_.push_back(Filled<W>(size_t{1} * n * k, factor, ++seed_ << 33));
      owned_.push_back(std::make_unique<Memory>(n * sizeof(float)));
      owned_.back()->Write(std::vector<float>(n, kSize));
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
                          .scale = kScale};
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
    owned_.push_back(Filled<__nv_bfloat16>(size_t{kVocab} * kHidden, kSize, ++seed_ << 33));
    args_.head = owned_.back()->template get<void>();
    std::vector<int32_t> rows = {0, kPosition};  // slot, position, table
    for (int i = 0; i < blocks; ++i) rows.push_back(TableOf(i));
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

using Row = std::vector<double>;

Row Rounded(Row row) {
  for (double& v : row) v = HostFloat(__float2bfloat16(static_cast<float>(v)));
  return row;
}

// What Llama computes, in double, rounded to bf16 where the kernel rounds.
template <typename W>
class Reference {
 public:
  explicit Reference(int tp) : heads_(32 / tp), kv_heads_(8 / tp), mlp_(14'336 / tp) {}

  // The logits of some tokens.
  Row Logits(const std::vector<int>& tokens) {
    const int width = heads_ * kHeadDim, kv_width = kv_heads_ * kHeadDim;
    uint64_t seed = kLayers * 6 + 1;  // of what comes behind the layers
    Row x(kHidden);
    for (int i = 0; i < kHidden; ++i) x[i] = HostFloat(Number<__nv_bfloat16>(seed << 33, i, 1.0f));
    for (uint64_t l = 0; l < kLayers; ++l) {
      const uint64_t first = 6 * l + 1;
      const Row qkv = Rounded(Times<W>(first, Range(width + 2 * kv_width), Normed(x)));
      Add(Times<W>(first + 1, Range(kHidden), Rounded(Attend(first + 4, qkv))), &x);
      const Row both = Times<W>(first + 2, Range(2 * mlp_), Normed(x));
      Row activated(mlp_);
      for (int i = 0; i < mlp_; ++i)
        activated[i] = both[2 * i] / (1 + std::exp(-both[2 * i])) * both[2 * i + 1];
      Add(Times<W>(first + 3, Range(kHidden), Rounded(activated)), &x);
    }
    return Times<__nv_bfloat16>(seed + 1, tokens, Normed(x));
  }

 private:
  static std::vector<int> Range(int n) {
    std::vector<int> range(n);
    std::iota(range.begin(), range.end(), 0);
    return range;
  }
  static Row Normed(const Row& x) {
    double squares = 0;
    for (const double v : x) squares += v * v;
    Row normed = x;
    for (double& v : normed) v /= std::sqrt(squares / kHidden + 1e-5);
    return Rounded(normed);
  }
  static void Add(const Row& sums, Row* x) {
    const Row rounded = Rounded(sums);
    for (size_t i = 0; i < x->size(); ++i) (*x)[i] += rounded[i];
    *x = Rounded(*x);
  }
  // Some rows of a matrix times x, by all cores.
  template <typename M>
  static Row Times(uint64_t seed, const std::vector<int>& rows, const Row& x) {
    Row out(rows.size());
    const size_t threads = std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::thread> workers;
    for (size_t t = 0; t < threads; ++t) {
      workers.emplace_back([&, t] {
        for (size_t r = t; r < rows.size(); r += threads) {
          double sum = 0;
          for (size_t k = 0; k < x.size(); ++k) {
            const uint64_t i = uint64_t(rows[r]) * x.size() + k;
            sum += x[k] * HostFloat(Number<M>(seed << 33, i, sizeof(M) == 1 ? 1.0f : kSize));
          }
          out[r] = sizeof(M) == 1 ? sum * kSize : sum;
        }
      });
    }
    for (std::thread& worker : workers) worker.join();
    return out;
  }
  Row Attend(uint64_t k_seed, const Row& qkv) const {
    const int width = heads_ * kHeadDim, kv_width = kv_heads_ * kHeadDim;
    Row out(width);
    for (int h = 0; h < heads_; ++h) {
      const int kv_head = h / (heads_ / kv_heads_);
      // Of k (part 0) or v (part 1); the row's own are not in the cache yet.
      const auto at = [&](int part, int position, int d) -> double {
        if (position == kPosition) return qkv[width + part * kv_width + kv_head * kHeadDim + d];
        const uint64_t block = TableOf(position / kBlock);
        const uint64_t row = (block * kv_heads_ + kv_head) * kBlock + position % kBlock;
        return HostFloat(Number<__nv_bfloat16>((k_seed + part) << 33, row * kHeadDim + d, 1.0f));
      };
      Row weights(kPosition + 1);
      double total = 0;
      for (int p = 0; p <= kPosition; ++p) {
        double score = 0;
        for (int d = 0; d < kHeadDim; ++d) score += qkv[h * kHeadDim + d] * at(0, p, d);
        total += weights[p] = std::exp(score * kScale);
      }
      for (int p = 0; p <= kPosition; ++p) {
        for (int d = 0; d < kHeadDim; ++d)
          out[h * kHeadDim + d] += weights[p] / total * at(1, p, d);
      }
    }
    return out;
  }

  const int heads_, kv_heads_, mlp_;
};

class RowStackLargeTest : public ::testing::TestWithParam<int> {};

template <typename W>
void CheckRepeats(int tp) {
  Llama<W> llama(tp);
  const std::vector<float> first = llama.Logits();
  EXPECT_TRUE(std::all_of(first.begin(), first.end(), [](float v) { return std::isfinite(v); }));
  std::vector<int> tokens;
  for (int i = 0; i < 40; ++i) tokens.push_back(static_cast<int>(int64_t{i} * (kVocab - 1) / 39));
  const Row want = Reference<W>(tp).Logits(tokens);
  double squares = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    EXPECT_NEAR(first[tokens[i]], want[i], 0.06) << "token " << tokens[i];
    squares += want[i] * want[i] / tokens.size();
  }
  EXPECT_GT(squares, 0.3);  // of which the bound is small
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
