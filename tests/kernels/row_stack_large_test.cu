// One kernel for a row's layers at the sizes of Llamas of 8B and 70B, where its rings go round
// thousands of times a launch: whatever is read too early or too late changes bits. The same launch
// must give the same logits every time, and near those of the same arithmetic in double.
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

constexpr int kHeadDim = 128, kLayers = 4, kBlock = 16;
constexpr int kVocab = 70'000;  // more rows a block than it sums up at a time
constexpr int kContext = 1'200, kPosition = 1'100;
constexpr float kScale = 0.088f;

// What one rank of a group has; there are no other ranks.
struct Shape {
  int hidden, heads, kv_heads, mlp;
  // Of weights, for activations whose size stays.
  float weight_size() const { return 1.7f / std::sqrt(static_cast<float>(hidden)); }
};
constexpr Shape Of8B(int tp) { return {4'096, 32 / tp, 8 / tp, 14'336 / tp}; }
constexpr Shape Of70B(int tp) { return {8'192, 64 / tp, 8 / tp, 28'672 / tp}; }

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
  explicit Llama(const Shape& shape) : s_(shape) {
    EXPECT_CUDA(InitRowStack());
    const auto matrix = [&](int n, int k) {
      const float factor = sizeof(W) == 1 ? 1.0f : s_.weight_size();
      owned_.push_back(Filled<W>(size_t{1} * n * k, factor, ++seed_ << 33));
      owned_.push_back(std::make_unique<Memory>(n * sizeof(float)));
      owned_.back()->Write(std::vector<float>(n, s_.weight_size()));
      return StackMatrix{owned_[owned_.size() - 2]->template get<void>(),
                         owned_.back()->template get<float>()};
    };
    const auto vector = [&](size_t count, float around) {
      std::vector<__nv_bfloat16> values(count, __float2bfloat16(around));
      owned_.push_back(std::make_unique<Memory>(2 * count));
      owned_.back()->Write(values);
      return owned_.back()->template get<void>();
    };
    const void* const ones = vector(s_.hidden, 1.0f);
    const int blocks = kContext / kBlock, width = s_.heads * kHeadDim;
    for (int l = 0; l < kLayers; ++l) {
      StackLayer layer = {.qkv = matrix(width + 2 * s_.kv_heads * kHeadDim, s_.hidden),
                          .o = matrix(s_.hidden, width),
                          .gate_up = matrix(2 * s_.mlp, s_.hidden),
                          .down = matrix(s_.hidden, s_.mlp),
                          .attention_norm = ones,
                          .mlp_norm = ones,
                          .scale = kScale};
      layer.kv.kv_heads = s_.kv_heads;
      layer.kv.head_dim = kHeadDim;
      for (void** part : {&layer.kv.k, &layer.kv.v}) {
        owned_.push_back(Filled<__nv_bfloat16>(size_t{1} * blocks * kBlock * s_.kv_heads * kHeadDim,
                                               1.0f, ++seed_ << 33));
        *part = owned_.back()->template get<void>();
      }
      layers_.push_back(layer);
    }
    owned_.push_back(Filled<__nv_bfloat16>(s_.hidden, 1.0f, ++seed_ << 33));
    args_.residual = owned_.back()->template get<void>();
    owned_.push_back(
        Filled<__nv_bfloat16>(size_t{kVocab} * s_.hidden, s_.weight_size(), ++seed_ << 33));
    args_.head = owned_.back()->template get<void>();
    std::vector<int32_t> rows = {0, kPosition};  // slot, position, table
    for (int i = 0; i < blocks; ++i) rows.push_back(TableOf(i));
    owned_.push_back(std::make_unique<Memory>(rows.size() * sizeof(int32_t)));
    owned_.back()->Write(rows);
    const int32_t* const at = owned_.back()->template get<int32_t>();
    args_.rows = {.slot = at, .position = at + 1, .block_table = at + 2, .table_stride = blocks};
    region_ = std::make_unique<Memory>(GemvExchangeBytes(1, s_.hidden));
    exchange_.peers.base[0] = region_->get<std::byte>();
    exchange_.width = s_.hidden;
    EXPECT_CUDA(ClearGemvExchange(exchange_, nullptr));
    logits_ = std::make_unique<Memory>(kVocab * sizeof(float));
    args_.weight_type = sizeof(W) == 1 ? Type::kE4M3 : Type::kBF16;
    args_.hidden = s_.hidden;
    args_.heads = s_.heads;
    args_.intermediate = s_.mlp;
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
  const Shape s_;
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
  explicit Reference(const Shape& shape) : s_(shape) {}

  // The logits of some tokens.
  Row Logits(const std::vector<int>& tokens) {
    const int width = s_.heads * kHeadDim, kv_width = s_.kv_heads * kHeadDim;
    uint64_t seed = kLayers * 6 + 1;  // of what comes behind the layers
    Row x(s_.hidden);
    for (int i = 0; i < s_.hidden; ++i)
      x[i] = HostFloat(Number<__nv_bfloat16>(seed << 33, i, 1.0f));
    for (uint64_t l = 0; l < kLayers; ++l) {
      const uint64_t first = 6 * l + 1;
      const Row qkv = Rounded(Times<W>(first, Range(width + 2 * kv_width), Normed(x)));
      Add(Times<W>(first + 1, Range(s_.hidden), Rounded(Attend(first + 4, qkv))), &x);
      const Row both = Times<W>(first + 2, Range(2 * s_.mlp), Normed(x));
      Row activated(s_.mlp);
      for (int i = 0; i < s_.mlp; ++i)
        activated[i] = both[2 * i] / (1 + std::exp(-both[2 * i])) * both[2 * i + 1];
      Add(Times<W>(first + 3, Range(s_.hidden), Rounded(activated)), &x);
    }
    return Times<__nv_bfloat16>(seed + 1, tokens, Normed(x));
  }

 private:
  static std::vector<int> Range(int n) {
    std::vector<int> range(n);
    std::iota(range.begin(), range.end(), 0);
    return range;
  }
  Row Normed(const Row& x) const {
    double squares = 0;
    for (const double v : x) squares += v * v;
    Row normed = x;
    for (double& v : normed) v /= std::sqrt(squares / s_.hidden + 1e-5);
    return Rounded(normed);
  }
  static void Add(const Row& sums, Row* x) {
    const Row rounded = Rounded(sums);
    for (size_t i = 0; i < x->size(); ++i) (*x)[i] += rounded[i];
    *x = Rounded(*x);
  }
  // Some rows of a matrix times x, by all cores.
  template <typename M>
  Row Times(uint64_t seed, const std::vector<int>& rows, const Row& x) const {
    Row out(rows.size());
    const size_t threads = std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::thread> workers;
    for (size_t t = 0; t < threads; ++t) {
      workers.emplace_back([&, t] {
        for (size_t r = t; r < rows.size(); r += threads) {
          double sum = 0;
          for (size_t k = 0; k < x.size(); ++k) {
            const uint64_t i = uint64_t(rows[r]) * x.size() + k;
            sum += x[k] *
                   HostFloat(Number<M>(seed << 33, i, sizeof(M) == 1 ? 1.0f : s_.weight_size()));
          }
          out[r] = sizeof(M) == 1 ? sum * s_.weight_size() : sum;
        }
      });
    }
    for (std::thread& worker : workers) worker.join();
    return out;
  }
  Row Attend(uint64_t k_seed, const Row& qkv) const {
    const int width = s_.heads * kHeadDim, kv_width = s_.kv_heads * kHeadDim;
    Row out(width);
    for (int h = 0; h < s_.heads; ++h) {
      const int kv_head = h / (s_.heads / s_.kv_heads);
      // Of k (part 0) or v (part 1); the row's own are not in the cache yet.
      const auto at = [&](int part, int position, int d) -> double {
        if (position == kPosition) return qkv[width + part * kv_width + kv_head * kHeadDim + d];
        const uint64_t block = TableOf(position / kBlock);
        const uint64_t row = (block * s_.kv_heads + kv_head) * kBlock + position % kBlock;
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

  const Shape s_;
};

struct Case {
  const char* name;
  Shape shape;
};
class RowStackLargeTest : public ::testing::TestWithParam<Case> {};

template <typename W>
void CheckRepeats(const Shape& shape) {
  Llama<W> llama(shape);
  const std::vector<float> first = llama.Logits();
  EXPECT_TRUE(std::all_of(first.begin(), first.end(), [](float v) { return std::isfinite(v); }));
  std::vector<int> tokens;
  for (int i = 0; i < 40; ++i) tokens.push_back(static_cast<int>(int64_t{i} * (kVocab - 1) / 39));
  const Row want = Reference<W>(shape).Logits(tokens);
  double squares = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    EXPECT_NEAR(first[tokens[i]], want[i], 0.06) << "token " << tokens[i];
    squares += want[i] * want[i] / tokens.size();
  }
  EXPECT_GT(squares, 0.3);  // of which the bound is small
  for (int i = 0; i < (SanitizerRun() ? 1 : 2'000); ++i)
    ASSERT_EQ(llama.Logits(), first) << "launch " << i;
  EXPECT_TRUE(llama.GuardsIntact());
}

TEST_P(RowStackLargeTest, GivesTheSameBitsEveryTime) {
  CheckRepeats<__nv_bfloat16>(GetParam().shape);
}
TEST_P(RowStackLargeTest, GivesTheSameBitsEveryTimeFromFp8) {
  CheckRepeats<__nv_fp8_e4m3>(GetParam().shape);
}
INSTANTIATE_TEST_SUITE_P(Shapes, RowStackLargeTest,
                         ::testing::Values(Case{"8B_tp1", Of8B(1)}, Case{"8B_tp2", Of8B(2)},
                                           Case{"8B_tp4", Of8B(4)}, Case{"70B_tp2", Of70B(2)},
                                           Case{"70B_tp4", Of70B(4)}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace lockstep::kernels
