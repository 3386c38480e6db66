// Every instruction set's kernels against plain loops in double precision, over
// shapes with odd tails, with guard values around what they write; and the
// property everything rests on: one result, bit for bit, however the work is cut.
#include "worker/backend/cpu/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "worker/backend/cpu/gemm.h"
#include "worker/backend/cpu/half.h"

namespace lockstep::cpu {
namespace {

constexpr float kGuard = 12345.678f;
constexpr int kGuards = 19;

// Values in [-1, 1), then rounded to a dtype so that a reference can use them.
class Numbers {
 public:
  explicit Numbers(uint32_t seed) : generator_(seed) {}
  std::vector<float> Floats(int64_t n) {
    std::vector<float> values(n);
    for (float& v : values) v = uniform_(generator_);
    return values;
  }

 private:
  std::mt19937 generator_;
  std::uniform_real_distribution<float> uniform_{-1.0f, 1.0f};
};

struct Matrix {
  std::vector<std::byte> bytes;
  std::vector<float> values;  // as stored
  WeightTensor tensor;
};

Matrix MakeMatrix(Numbers& numbers, int64_t rows, int64_t cols, DType dtype) {
  Matrix m;
  m.values = numbers.Floats(rows * cols);
  m.bytes.resize(m.values.size() * (dtype == DType::kFloat32 ? 4 : 2));
  for (size_t i = 0; i < m.values.size(); ++i) {
    if (dtype == DType::kFloat32) {
      std::memcpy(m.bytes.data() + 4 * i, &m.values[i], 4);
    } else if (dtype == DType::kBFloat16) {
      const BFloat16 h = ToBFloat16(m.values[i]);
      std::memcpy(m.bytes.data() + 2 * i, &h, 2);
      m.values[i] = ToFloat(h);
    } else {
      const Float16 h = ToFloat16(m.values[i]);
      std::memcpy(m.bytes.data() + 2 * i, &h, 2);
      m.values[i] = ToFloat(h);
    }
  }
  m.tensor = {m.bytes.data(), dtype, rows, cols};
  return m;
}

std::vector<float> Guarded(int64_t n) { return std::vector<float>(n + 2 * kGuards, kGuard); }

void ExpectGuards(const std::vector<float>& buffer) {
  for (int i = 0; i < kGuards; ++i) {
    ASSERT_EQ(buffer[i], kGuard) << "written before the output";
    ASSERT_EQ(buffer[buffer.size() - 1 - i], kGuard) << "written after the output";
  }
}

class KernelsTest : public testing::TestWithParam<const Kernels*> {
 protected:
  const Kernels& k() const { return *GetParam(); }
};

std::vector<float> RunGemm(const Kernels& kernels, ThreadPool& pool, const std::vector<float>& x,
                           int64_t ldx, int64_t m, const WeightTensor& w, int64_t slices) {
  GemmWorkspace workspace(kernels, pool.size());
  std::vector<float> y = Guarded(m * w.rows);
  Gemm(kernels, pool, workspace, x.data(), ldx, m, w, slices, y.data() + kGuards, w.rows);
  ExpectGuards(y);
  return {y.begin() + kGuards, y.end() - kGuards};
}

TEST_P(KernelsTest, GemmMatchesDoublePrecision) {
  struct Shape {
    int64_t m, n, k, slices;
  };
  const Shape shapes[] = {{1, 1, 1, 1},     {1, 7, 5, 1},    {1, 33, 64, 4},   {2, 5, 16, 1},
                          {3, 9, 31, 1},    {5, 64, 48, 3},  {7, 13, 100, 4},  {15, 40, 96, 8},
                          {16, 33, 17, 1},  {17, 70, 80, 5}, {49, 31, 600, 6}, {97, 65, 1100, 1},
                          {100, 3, 1056, 2}};
  ThreadPool pool(2);
  Numbers numbers(7);
  for (const Shape& s : shapes) {
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
      const int64_t ldx = s.k + 3;
      const std::vector<float> x = numbers.Floats(s.m * ldx);
      const Matrix w = MakeMatrix(numbers, s.n, s.k, dtype);
      const std::vector<float> y = RunGemm(k(), pool, x, ldx, s.m, w.tensor, s.slices);
      for (int64_t i = 0; i < s.m; ++i) {
        for (int64_t j = 0; j < s.n; ++j) {
          double expected = 0.0, size = 0.0;
          for (int64_t e = 0; e < s.k; ++e) {
            const double term = double{x[i * ldx + e]} * w.values[j * s.k + e];
            expected += term;
            size += std::abs(term);
          }
          ASSERT_NEAR(y[i * s.n + j], expected, 1e-6 * size + 1e-7)
              << s.m << " x " << s.n << " x " << s.k << " in " << s.slices << " at " << i << ","
              << j;
        }
      }
    }
  }
}

TEST_P(KernelsTest, ARowOfAGemmDoesNotDependOnTheOtherRows) {
  Numbers numbers(11);
  ThreadPool one(1), three(3);
  for (const int64_t slices : {1, 4, 6}) {
    const int64_t n = 75, depth = 1224;
    const Matrix w = MakeMatrix(numbers, n, depth, DType::kBFloat16);
    const std::vector<float> x = numbers.Floats(120 * depth);
    const std::vector<float> all = RunGemm(k(), one, x, depth, 120, w.tensor, slices);
    for (const int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 13, 15, 16, 17, 50, 119}) {
      const std::vector<float> some = RunGemm(k(), three, x, depth, m, w.tensor, slices);
      ASSERT_EQ(0, std::memcmp(some.data(), all.data(), some.size() * sizeof(float))) << m;
    }
  }
}

TEST_P(KernelsTest, SlicesOnSeveralRanksAddUpToTheSlicesOfOne) {
  Numbers numbers(13);
  ThreadPool pool(1);
  const int64_t n = 21, depth = 8 * 24, slices = 8;
  for (const int64_t m : {1, 5, 40}) {
    const Matrix w = MakeMatrix(numbers, n, depth, DType::kFloat32);
    const std::vector<float> x = numbers.Floats(m * depth);
    const std::vector<float> whole = RunGemm(k(), pool, x, depth, m, w.tensor, slices);
    for (const int64_t ranks : {2, 4, 8}) {
      const int64_t part = depth / ranks;
      std::vector<std::vector<float>> level;
      for (int64_t r = 0; r < ranks; ++r) {
        Matrix share;
        for (int64_t j = 0; j < n; ++j) {
          const float* row = w.values.data() + j * depth + r * part;
          share.values.insert(share.values.end(), row, row + part);
        }
        share.tensor = {reinterpret_cast<std::byte*>(share.values.data()), DType::kFloat32, n,
                        part};
        std::vector<float> mine;
        for (int64_t i = 0; i < m; ++i) {
          const float* row = x.data() + i * depth + r * part;
          mine.insert(mine.end(), row, row + part);
        }
        level.push_back(RunGemm(k(), pool, mine, part, m, share.tensor, slices / ranks));
      }
      for (; level.size() > 1; level.resize(level.size() / 2)) {
        for (size_t i = 0; i < level.size() / 2; ++i) {
          for (size_t e = 0; e < level[0].size(); ++e) {
            level[i][e] = level[2 * i][e] + level[2 * i + 1][e];
          }
        }
      }
      ASSERT_EQ(0, std::memcmp(level[0].data(), whole.data(), whole.size() * sizeof(float)))
          << ranks << " ranks, " << m << " rows";
    }
  }
}

// K and V of one KV head, blocks of a pool in a shuffled order.
struct Cache {
  Matrix k, v;
  std::vector<uint32_t> table;
  int64_t block_size = 0, head_dim = 0;
};

Cache MakeCache(Numbers& numbers, int64_t positions, int64_t block_size, int64_t head_dim,
                DType dtype) {
  Cache c;
  const int64_t blocks = (positions + block_size - 1) / block_size;
  c.k = MakeMatrix(numbers, (blocks + 2) * block_size, head_dim, dtype);
  c.v = MakeMatrix(numbers, (blocks + 2) * block_size, head_dim, dtype);
  for (int64_t i = 0; i < blocks; ++i)
    c.table.push_back(static_cast<uint32_t>((i * 7 + 1) % (blocks + 2)));
  // 7 and blocks + 2 may share a factor; then ids in order do.
  std::vector<uint32_t> sorted = c.table;
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
    for (int64_t i = 0; i < blocks; ++i) c.table[i] = static_cast<uint32_t>(blocks + 1 - i);
  }
  c.block_size = block_size;
  c.head_dim = head_dim;
  return c;
}

std::vector<float> RunAttention(const Kernels& kernels, const Cache& c, const std::vector<float>& q,
                                int64_t heads, int64_t begin, int64_t end) {
  std::vector<float> out = Guarded(heads * c.head_dim);
  std::vector<float> scores(heads * ((end - begin + 15) / 16 * 16));
  kernels.attention({.q = q.data(),
                     .heads = heads,
                     .head_dim = c.head_dim,
                     .k = c.k.bytes.data(),
                     .v = c.v.bytes.data(),
                     .dtype = c.k.tensor.dtype,
                     .table = c.table.data(),
                     .block_size = c.block_size,
                     .block_stride = c.block_size * c.head_dim,
                     .begin = begin,
                     .end = end,
                     .scale = 0.7f,
                     .scores = scores.data(),
                     .out = out.data() + kGuards});
  ExpectGuards(out);
  return {out.begin() + kGuards, out.end() - kGuards};
}

TEST_P(KernelsTest, AttentionMatchesDoublePrecision) {
  Numbers numbers(17);
  for (const int64_t head_dim : {1, 8, 16, 24, 64, 80, 128}) {
    for (const int64_t block_size : {1, 3, 16}) {
      for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        const int64_t positions = 37, heads = head_dim == 8 ? 19 : 5;
        const Cache c = MakeCache(numbers, positions, block_size, head_dim, dtype);
        const std::vector<float> q = numbers.Floats(heads * head_dim);
        for (const auto& [begin, end] :
             {std::pair<int64_t, int64_t>{0, 37}, {0, 1}, {5, 30}, {36, 37}}) {
          const std::vector<float> out = RunAttention(k(), c, q, heads, begin, end);
          for (int64_t h = 0; h < heads; ++h) {
            std::vector<double> expected(head_dim, 0.0);
            double sum = 0.0;
            for (int64_t p = begin; p < end; ++p) {
              const int64_t row = c.table[p / block_size] * block_size + p % block_size;
              double score = 0.0;
              for (int64_t d = 0; d < head_dim; ++d) {
                score += double{q[h * head_dim + d]} * c.k.values[row * head_dim + d];
              }
              const double weight = std::exp(0.7 * score);
              sum += weight;
              for (int64_t d = 0; d < head_dim; ++d) {
                expected[d] += weight * c.v.values[row * head_dim + d];
              }
            }
            for (int64_t d = 0; d < head_dim; ++d) {
              ASSERT_NEAR(out[h * head_dim + d], expected[d] / sum, 3e-6)
                  << "head " << h << " of dim " << head_dim << ", block " << block_size;
            }
          }
        }
      }
    }
  }
}

TEST_P(KernelsTest, AttentionDoesNotDependOnBlocksOrOnOtherHeads) {
  Numbers numbers(19);
  const int64_t head_dim = 40, positions = 61, heads = 7;
  const Cache flat = MakeCache(numbers, positions, 64, head_dim, DType::kFloat32);
  Cache paged = flat;
  paged.block_size = 4;
  paged.table.clear();
  for (uint32_t i = 0; i < 16; ++i) paged.table.push_back(flat.table[0] * 16 + i);
  const std::vector<float> q = numbers.Floats(heads * head_dim);
  const std::vector<float> all = RunAttention(k(), flat, q, heads, 3, positions);
  EXPECT_EQ(all, RunAttention(k(), paged, q, heads, 3, positions));
  for (int64_t h = 0; h < heads; ++h) {
    const std::vector<float> one_q(q.begin() + h * head_dim, q.begin() + (h + 1) * head_dim);
    const std::vector<float> one = RunAttention(k(), flat, one_q, 1, 3, positions);
    EXPECT_TRUE(std::equal(one.begin(), one.end(), all.begin() + h * head_dim)) << h;
  }
}

TEST_P(KernelsTest, NormsMatchDoublePrecision) {
  Numbers numbers(23);
  for (const int64_t n : {1, 8, 15, 16, 33, 256}) {
    const std::vector<float> x = numbers.Floats(n), w = numbers.Floats(n), b = numbers.Floats(n);
    double sum = 0.0, squares = 0.0, variance = 0.0;
    for (const float v : x) sum += v, squares += double{v} * v;
    const double mean = sum / static_cast<double>(n);
    for (const float v : x) variance += (v - mean) * (v - mean) / static_cast<double>(n);
    for (const float offset : {0.0f, 1.0f}) {
      std::vector<float> out = Guarded(n);
      k().rms_norm(x.data(), w.data(), offset, 1e-5f, n, out.data() + kGuards);
      ExpectGuards(out);
      for (int64_t i = 0; i < n; ++i) {
        const double expected =
            x[i] / std::sqrt(squares / static_cast<double>(n) + 1e-5) * (double{w[i]} + offset);
        ASSERT_NEAR(out[kGuards + i], expected, 2e-6 * (1 + std::abs(expected)));
      }
    }
    std::vector<float> out = Guarded(n);
    k().layer_norm(x.data(), w.data(), b.data(), 1e-5f, n, out.data() + kGuards);
    ExpectGuards(out);
    for (int64_t i = 0; i < n; ++i) {
      const double expected = (x[i] - mean) / std::sqrt(variance + 1e-5) * w[i] + b[i];
      ASSERT_NEAR(out[kGuards + i], expected, 4e-6 * (1 + std::abs(expected)));
    }
  }
}

double ReferenceActivation(Activation a, double x) {
  switch (a) {
    case Activation::kSilu:
      return x / (1.0 + std::exp(-x));
    case Activation::kGeluTanh:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kGelu:
      return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
    case Activation::kRelu:
      return std::max(x, 0.0);
  }
  return 0.0;
}

TEST_P(KernelsTest, ActivationsMatchDoublePrecision) {
  for (const Activation a :
       {Activation::kSilu, Activation::kGeluTanh, Activation::kGelu, Activation::kRelu}) {
    std::vector<float> x;
    for (float v = -30.0f; v <= 30.0f; v += 0.037f) x.push_back(v);
    for (const float v : {-1e30f, -200.0f, -0.0f, 0.0f, 1e-20f, 200.0f, 1e30f}) x.push_back(v);
    const int64_t n = static_cast<int64_t>(x.size());
    const std::vector<float> up(x.size(), -1.5f);
    for (const float* gate_up : {static_cast<const float*>(nullptr), up.data()}) {
      std::vector<float> out = Guarded(n);
      k().activate(a, x.data(), gate_up, n, out.data() + kGuards);
      ExpectGuards(out);
      for (int64_t i = 0; i < n; ++i) {
        const double expected = ReferenceActivation(a, x[i]) * (gate_up == nullptr ? 1.0 : -1.5);
        ASSERT_NEAR(out[kGuards + i], expected, 5e-7 * std::max(1.0, std::abs(expected)))
            << static_cast<int>(a) << " of " << x[i];
      }
    }
  }
}

TEST_P(KernelsTest, ExpIsCloseEverywhereAndZeroFarBelow) {
  std::vector<float> x;
  for (float v = -87.0f; v <= 88.0f; v += 0.013f) x.push_back(v);
  const int64_t n = static_cast<int64_t>(x.size());
  std::vector<float> out = Guarded(n);
  const double sum = k().exp_sum(x.data(), 0.0f, n, out.data() + kGuards);
  ExpectGuards(out);
  for (int64_t i = 0; i < n; ++i) {
    const double expected = std::exp(double{x[i]});
    ASSERT_NEAR(out[kGuards + i], expected, 3e-7 * expected) << x[i];
  }
  EXPECT_EQ(sum, std::numeric_limits<double>::infinity());  // beyond a float within a run
  double expected_sum = 0.0;
  for (const float v : x) expected_sum += std::exp(double{v} - 88.0);
  EXPECT_NEAR(k().exp_sum(x.data(), 88.0f, n, out.data() + kGuards), expected_sum,
              1e-5 * expected_sum);
  const std::vector<float> far = {-88.0f, -1e30f, -std::numeric_limits<float>::infinity(), 0.0f};
  std::vector<float> result(4);
  EXPECT_EQ(k().exp_sum(far.data(), 0.0f, 4, result.data()), 1.0);
  EXPECT_EQ(result, (std::vector<float>{0.0f, 0.0f, 0.0f, 1.0f}));
}

TEST_P(KernelsTest, FindsTheLargestAndWhatIsNotFinite) {
  Numbers numbers(29);
  for (const int64_t n : {1, 2, 15, 16, 17, 100, 1000}) {
    std::vector<float> x = numbers.Floats(n);
    EXPECT_EQ(k().max(x.data(), n), *std::max_element(x.begin(), x.end()));
    EXPECT_TRUE(k().all_finite(x.data(), n));
    for (const int64_t at : {int64_t{0}, n / 2, n - 1}) {
      for (const float bad :
           {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
            -std::numeric_limits<float>::infinity()}) {
        std::vector<float> y = x;
        y[at] = bad;
        EXPECT_FALSE(k().all_finite(y.data(), n)) << bad << " at " << at << " of " << n;
      }
    }
  }
}

TEST_P(KernelsTest, RopeRotatesPairs) {
  Numbers numbers(31);
  for (const int64_t half : {1, 4, 16, 20, 64}) {
    std::vector<float> x = Guarded(2 * half);
    const std::vector<float> before = numbers.Floats(2 * half);
    std::copy(before.begin(), before.end(), x.begin() + kGuards);
    std::vector<float> cos, sin;
    for (int64_t i = 0; i < half; ++i) {
      cos.push_back(std::cos(0.3f * static_cast<float>(i)));
      sin.push_back(std::sin(0.3f * static_cast<float>(i)));
    }
    k().rope(x.data() + kGuards, cos.data(), sin.data(), half);
    ExpectGuards(x);
    for (int64_t i = 0; i < half; ++i) {
      EXPECT_FLOAT_EQ(x[kGuards + i], before[i] * cos[i] - before[i + half] * sin[i]);
      EXPECT_FLOAT_EQ(x[kGuards + half + i], before[i + half] * cos[i] + before[i] * sin[i]);
    }
  }
}

TEST_P(KernelsTest, WidensEverySixteenBitValueExactly) {
  std::vector<uint16_t> bits(65536);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
  std::vector<float> wide(bits.size());
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    k().widen(bits.data(), dtype, 65536, wide.data());
    std::vector<uint16_t> back(bits.size());
    k().narrow(wide.data(), 65536, dtype, back.data());
    for (size_t i = 0; i < bits.size(); ++i) {
      const bool half = dtype == DType::kFloat16;
      const float expected = half ? ToFloat(Float16{bits[i]}) : ToFloat(BFloat16{bits[i]});
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(wide[i])) << i;
        const float again = half ? ToFloat(Float16{back[i]}) : ToFloat(BFloat16{back[i]});
        ASSERT_TRUE(std::isnan(again)) << i;
      } else {
        ASSERT_EQ(std::bit_cast<uint32_t>(wide[i]), std::bit_cast<uint32_t>(expected)) << i;
        ASSERT_EQ(back[i], bits[i]);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sets, KernelsTest, testing::ValuesIn(AvailableKernels()),
                         [](const auto& set) { return set.param->name; });

TEST(KernelSetsTest, FusedSetsAgreeBitForBit) {
  const std::vector<const Kernels*> sets = AvailableKernels();
  Numbers numbers(37);
  ThreadPool pool(1);
  const Matrix w = MakeMatrix(numbers, 50, 321, DType::kFloat16);
  const std::vector<float> x = numbers.Floats(30 * 321);
  const Cache c = MakeCache(numbers, 50, 16, 72, DType::kBFloat16);
  const std::vector<float> q = numbers.Floats(6 * 72);
  for (const Kernels* set : sets) {
    if (std::string(set->name) == "generic") continue;  // no fused multiply-add
    EXPECT_EQ(RunGemm(*set, pool, x, 321, 30, w.tensor, 3),
              RunGemm(*sets[0], pool, x, 321, 30, w.tensor, 3));
    EXPECT_EQ(RunAttention(*set, c, q, 6, 0, 50), RunAttention(*sets[0], c, q, 6, 0, 50));
  }
}

TEST(HalfTest, RoundsToTheNearestEven) {
  // Against the definition: the nearer neighbour, the even one in the middle.
  for (uint32_t i = 0; i < 0x7c00; ++i) {
    const double low = ToFloat(Float16{static_cast<uint16_t>(i)});
    const double high = i + 1 == 0x7c00 ? 65536.0 : ToFloat(Float16{static_cast<uint16_t>(i + 1)});
    const float middle = static_cast<float>((low + high) / 2);  // exact
    const uint16_t even = static_cast<uint16_t>(i % 2 == 0 ? i : i + 1);
    ASSERT_EQ(ToFloat16(middle).bits, even) << i;
    ASSERT_EQ(ToFloat16(std::nextafter(middle, 0.0f)).bits, i);
    ASSERT_EQ(ToFloat16(std::nextafter(middle, 1e9f)).bits, i + 1);
    ASSERT_EQ(ToFloat16(-middle).bits, even | 0x8000);
  }
  EXPECT_EQ(ToFloat16(1e30f).bits, 0x7c00);
  EXPECT_EQ(ToBFloat16(1.00390625f).bits, 0x3f80);  // 1 + 2^-8: a tie, to even
  EXPECT_EQ(ToBFloat16(1.01171875f).bits, 0x3f82);  // 1 + 3 * 2^-8: a tie, to even
  EXPECT_EQ(ToBFloat16(3.4e38f).bits, 0x7f80);
}

}  // namespace
}  // namespace lockstep::cpu
