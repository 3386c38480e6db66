// The exchanges against sums formed on the host in the same order, bit for bit;
// the norm against double. Thousands of rounds with inputs that change each time:
// all_reduce_soak_test.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernels/all_reduce.h"
#include "tests/kernels/virtual_ranks.h"

namespace lockstep::kernels {
namespace {

using testing::Guarded;
using testing::VirtualRanks;

template <typename T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr Type kType = Type::kF32;
  static constexpr double kUnit = 1e-5;  // of the norm: fp32 sums
};
template <>
struct TypeOf<__half> {
  static constexpr Type kType = Type::kF16;
  static constexpr double kUnit = 1.02 / 2048;
};
template <>
struct TypeOf<__nv_bfloat16> {
  static constexpr Type kType = Type::kBF16;
  static constexpr double kUnit = 1.02 / 256;
};

template <typename T>
std::vector<T> Random(size_t count, std::mt19937* generator, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<T> values(count);
  for (T& v : values) v = T(normal(*generator));
  return values;
}

template <typename T>
bool SameBits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

// What one rank holds on the device.
template <typename T>
struct RankBuffers {
  RankBuffers(size_t count, size_t hidden)
      : in(count * sizeof(T)),
        out(count * sizeof(T)),
        residual(count * sizeof(T)),
        residual_out(count * sizeof(T)),
        weight(hidden * sizeof(T)),
        bias(hidden * sizeof(T)) {}
  Guarded in, out, residual, residual_out, weight, bias;
};

struct FusedCase {
  int size, rows, hidden;
  bool bias, residual, norm, plus_one, padding;
};

template <typename T>
class AllReduceTest : public ::testing::Test {
 protected:
  // Runs one fused exchange on every rank, twice (both slots), by both paths.
  void Check(const FusedCase& c, VirtualRanks* ranks);

  std::mt19937 generator_{20240607};
};

using Types = ::testing::Types<float, __half, __nv_bfloat16>;
TYPED_TEST_SUITE(AllReduceTest, Types);

template <typename T>
void AllReduceTest<T>::Check(const FusedCase& c, VirtualRanks* ranks) {
  const size_t count = size_t(c.rows) * c.hidden;
  SCOPED_TRACE(::testing::Message()
               << "size " << c.size << " rows " << c.rows << " hidden " << c.hidden << " bias "
               << c.bias << " residual " << c.residual << " norm " << c.norm << " plus_one "
               << c.plus_one << " padding " << c.padding);
  std::vector<int32_t> slot(c.rows);
  for (int r = 0; r < c.rows; ++r) slot[r] = c.padding && r % 3 != 1 ? -1 : r;
  std::vector<RankBuffers<T>> buffers;
  std::vector<Guarded> slots;
  for (int r = 0; r < c.size; ++r) {
    ranks->Use(r);
    buffers.emplace_back(count, c.hidden);
    slots.emplace_back(c.rows * sizeof(int32_t));
    slots.back().Set(slot);
  }
  for (const AllReducePath path :
       {AllReducePath::kOneShot, AllReducePath::kTwoShot, AllReducePath::kOneShot}) {
    SCOPED_TRACE(path == AllReducePath::kOneShot ? "one-shot" : "two-shot");
    std::vector<std::vector<T>> in;
    const std::vector<T> residual = Random<T>(count, &generator_, 3.0f);
    const std::vector<T> weight = Random<T>(c.hidden, &generator_);
    const std::vector<T> bias = Random<T>(c.hidden, &generator_);
    for (int r = 0; r < c.size; ++r) {
      ranks->Use(r);
      in.push_back(Random<T>(count, &generator_));
      buffers[r].in.Set(in[r]);
      buffers[r].residual.Set(residual);
      buffers[r].weight.Set(weight);
      buffers[r].bias.Set(bias);
      ASSERT_CUDA(cudaMemset(buffers[r].out.get(), Guarded::kPoison, count * sizeof(T)));
      ASSERT_CUDA(cudaMemset(buffers[r].residual_out.get(), Guarded::kPoison, count * sizeof(T)));
      ASSERT_CUDA(cudaDeviceSynchronize());
    }
    for (int r = 0; r < c.size; ++r) {
      ranks->Use(r);
      const RankBuffers<T>& b = buffers[r];
      AllReduceArgs args;
      args.type = TypeOf<T>::kType;
      args.rows = c.rows;
      args.hidden = c.hidden;
      args.in = b.in.get();
      args.out = b.out.get();
      if (c.bias) args.bias = b.bias.get();
      if (c.residual) {
        args.residual = b.residual.get();
        args.residual_out = b.residual_out.get();
      }
      if (c.norm) args.norm_weight = b.weight.get();
      args.plus_one = c.plus_one;
      args.eps = 1e-6f;
      if (c.padding) args.slots = static_cast<const int32_t*>(slots[r].get());
      args.max_blocks = ranks->BlocksAtOnce(512);
      ASSERT_CUDA(AllReduce(ranks->launch(r), ranks->peers(r), ranks->layout(), path, args));
    }
    ranks->Synchronize();
    if (this->HasFatalFailure()) return;

    std::vector<std::vector<T>> out, residual_out;
    for (int r = 0; r < c.size; ++r) {
      ranks->Use(r);
      out.push_back(buffers[r].out.template Get<T>());
      residual_out.push_back(buffers[r].residual_out.template Get<T>());
      ASSERT_TRUE(buffers[r].out.GuardsIntact());
      ASSERT_TRUE(buffers[r].residual_out.GuardsIntact());
    }
    T poison;
    std::memset(static_cast<void*>(&poison), Guarded::kPoison, sizeof(T));
    for (int row = 0; row < c.rows; ++row) {
      const size_t at = size_t(row) * c.hidden;
      std::vector<T> sum(c.hidden);
      double squares = 0;
      for (int i = 0; i < c.hidden; ++i) {
        float s = float(in[0][at + i]);
        for (int r = 1; r < c.size; ++r) s += float(in[r][at + i]);
        if (c.bias) s += float(bias[i]);
        if (c.residual) s += float(residual[at + i]);
        sum[i] = T(s);
        squares += double(float(sum[i])) * float(sum[i]);
      }
      const double scale = 1.0 / std::sqrt(squares / c.hidden + 1e-6);
      for (int r = 0; r < c.size; ++r) {
        for (int i = 0; i < c.hidden; ++i) {
          const T got = out[r][at + i];
          ASSERT_TRUE(SameBits(got, out[0][at + i]))
              << "ranks differ, rank " << r << " row " << row;
          if (slot[row] < 0) {
            ASSERT_TRUE(SameBits(got, poison)) << "padding row " << row << " was written";
            ASSERT_TRUE(SameBits(residual_out[r][at + i], poison));
            continue;
          }
          if (c.residual) {
            ASSERT_TRUE(SameBits(residual_out[r][at + i], sum[i]))
                << "rank " << r << " row " << row << " column " << i << ": "
                << float(residual_out[r][at + i]) << " for " << float(sum[i]);
          }
          if (c.norm) {
            const double expected = float(sum[i]) * scale * (float(weight[i]) + c.plus_one);
            ASSERT_NEAR(float(got), expected, std::abs(expected) * TypeOf<T>::kUnit + 1e-6)
                << "rank " << r << " row " << row << " column " << i;
          } else {
            ASSERT_TRUE(SameBits(got, sum[i])) << float(got) << " for " << float(sum[i]);
          }
        }
      }
    }
  }
}

TYPED_TEST(AllReduceTest, FusedTailMatchesTheDefinition) {
  const int shapes[][2] = {{1, 8},     {3, 264},   {2, 520}, {5, 4096},
                           {33, 1032}, {1, 16384}, {2, 7168}};
  const std::vector<int> sizes =
      SanitizerRun() ? std::vector<int>{2, 3} : std::vector<int>{2, 3, 4, 5, 8};
  for (const int size : sizes) {
    VirtualRanks ranks(size, ExchangeLayout{.offset = 512, .two_shot_bytes = 1 << 20});
    int n = 0;
    for (const auto& [rows, hidden] : shapes) {
      if (SanitizerRun() && rows * hidden > 5000) continue;
      // Every option is on with every other one somewhere.
      for (const int options : {0b11111, 0b00110, 0b01100, 0b10011, 0b00001, 0b00010}) {
        if ((options + n++) % 3 == 1 && rows > 4) continue;
        this->Check({size, rows, hidden, (options & 1) != 0, (options & 2) != 0, (options & 4) != 0,
                     (options & 8) != 0, (options & 16) != 0},
                    &ranks);
        if (this->HasFatalFailure()) return;
      }
    }
  }
}

// A row's bits depend on its own content alone.
TYPED_TEST(AllReduceTest, ARowIsTheSameInEveryBatch) {
  using T = TypeParam;
  constexpr int kHidden = 4096, kRows = 24, kSize = 2;
  VirtualRanks ranks(kSize, ExchangeLayout{.one_shot_bytes = 1 << 20});
  std::vector<RankBuffers<T>> buffers;
  const std::vector<T> residual = Random<T>(kRows * kHidden, &this->generator_);
  const std::vector<T> weight = Random<T>(kHidden, &this->generator_);
  for (int r = 0; r < kSize; ++r) {
    ranks.Use(r);
    buffers.emplace_back(kRows * kHidden, kHidden);
    buffers[r].in.Set(Random<T>(kRows * kHidden, &this->generator_));
    buffers[r].residual.Set(residual);
    buffers[r].weight.Set(weight);
  }
  const auto run = [&](int first, int rows, AllReducePath path) {
    const size_t skip = size_t(first) * kHidden * sizeof(T);
    const auto at = [&](const Guarded& b) { return static_cast<std::byte*>(b.get()) + skip; };
    for (int r = 0; r < kSize; ++r) {
      ranks.Use(r);
      AllReduceArgs args;
      args.type = TypeOf<T>::kType;
      args.rows = rows;
      args.hidden = kHidden;
      args.in = at(buffers[r].in);
      args.out = at(buffers[r].out);
      args.residual = at(buffers[r].residual);
      args.residual_out = at(buffers[r].residual_out);
      args.norm_weight = buffers[r].weight.get();
      ASSERT_CUDA(AllReduce(ranks.launch(r), ranks.peers(r), ranks.layout(), path, args));
    }
    ranks.Synchronize();
  };
  run(0, kRows, AllReducePath::kOneShot);
  const std::vector<uint16_t> whole = buffers[0].out.template Get<uint16_t>();
  run(0, kRows, AllReducePath::kTwoShot);
  EXPECT_EQ(buffers[0].out.template Get<uint16_t>(), whole);
  for (int row = 0; row < kRows; ++row) run(row, 1, AllReducePath::kOneShot);
  EXPECT_EQ(buffers[1].out.template Get<uint16_t>(), whole);
}

// What one launch does not take goes in pieces, and a large message's norm is a
// kernel of its own: the bits stay.
TYPED_TEST(AllReduceTest, ALargeMessageHasTheSameBits) {
  using T = TypeParam;
  if (SanitizerRun()) return;
  for (const int size : {2, 4}) {
    VirtualRanks ranks(size,
                       ExchangeLayout{.one_shot_bytes = 96 << 10, .two_shot_bytes = 800 << 10});
    this->Check({size, 301, 4096, true, true, true, true, true}, &ranks);
    if (this->HasFatalFailure()) return;
    this->Check({size, 300, 2056, false, true, true, false, false}, &ranks);
    if (this->HasFatalFailure()) return;
  }
}

// Without rows: any number of elements, in place, values that add up exactly.
TYPED_TEST(AllReduceTest, SumsAnyNumberOfElementsInPlace) {
  using T = TypeParam;
  const std::vector<size_t> counts = {1, 2, 7, 8, 9, 255, 2048, 2049, 40001, 262144, 1000003};
  for (const int size : {2, 4, 7}) {
    VirtualRanks ranks(size, ExchangeLayout{.one_shot_bytes = 1 << 20, .two_shot_bytes = 4 << 20});
    for (const size_t count : counts) {
      if (SanitizerRun() && (count > 3000 || size > 4)) continue;
      std::vector<Guarded> data;
      std::vector<T> sum(count, T(0.0f));
      for (int r = 0; r < size; ++r) {
        ranks.Use(r);
        std::vector<T> mine(count);
        for (size_t i = 0; i < count; ++i) {
          mine[i] = T(float(int(this->generator_() % 17) - 8));
          sum[i] = T(float(sum[i]) + float(mine[i]));
        }
        data.emplace_back(count * sizeof(T));
        data[r].Set(mine);
      }
      AllReducePath path = AllReducePath::kNone;
      for (int r = 0; r < size; ++r) {
        ranks.Use(r);
        AllReduceArgs args;
        args.type = TypeOf<T>::kType;
        args.rows = 1;
        args.hidden = static_cast<int>(count);
        args.in = args.out = data[r].get();
        args.max_blocks = ranks.BlocksAtOnce(256);
        path = ChooseAllReduce(args, ranks.layout(), size);
        // For two ranks a second crossing saves nothing.
        ASSERT_EQ(path, size == 2 || count * sizeof(T) <= ranks.layout().one_shot_bytes
                            ? AllReducePath::kOneShot
                            : AllReducePath::kTwoShot);
        if (count % 2 == 0) path = AllReducePath::kTwoShot;
        ASSERT_CUDA(AllReduce(ranks.launch(r), ranks.peers(r), ranks.layout(), path, args));
      }
      ranks.Synchronize();
      if (this->HasFatalFailure()) return;
      for (int r = 0; r < size; ++r) {
        ranks.Use(r);
        const std::vector<T> got = data[r].template Get<T>();
        for (size_t i = 0; i < count; ++i) {
          ASSERT_EQ(float(got[i]), float(sum[i]))
              << "rank " << r << " of " << size << ", element " << i << " of " << count;
        }
        ASSERT_TRUE(data[r].GuardsIntact());
      }
    }
  }
}

// The word that stands for "nothing yet" is a NaN like any other to the caller.
TYPED_TEST(AllReduceTest, ANanOfAllOnesArrivesAsANan) {
  using T = TypeParam;
  constexpr int kCount = 64;
  for (const AllReducePath path : {AllReducePath::kOneShot, AllReducePath::kTwoShot}) {
    VirtualRanks ranks(2, ExchangeLayout{});
    std::vector<Guarded> data;
    for (int r = 0; r < 2; ++r) {
      ranks.Use(r);
      data.emplace_back(kCount * sizeof(T));
      std::vector<T> values(kCount, T(1.0f));
      if (r == 1) std::memset(static_cast<void*>(values.data()), 0xFF, 16);
      data[r].Set(values);
    }
    for (int r = 0; r < 2; ++r) {
      ranks.Use(r);
      AllReduceArgs args;
      args.type = TypeOf<T>::kType;
      args.rows = 1;
      args.hidden = kCount;
      args.in = args.out = data[r].get();
      ASSERT_CUDA(AllReduce(ranks.launch(r), ranks.peers(r), ranks.layout(), path, args));
    }
    ranks.Synchronize();
    for (int r = 0; r < 2; ++r) {
      ranks.Use(r);
      const std::vector<T> got = data[r].template Get<T>();
      for (size_t i = 0; i < kCount; ++i) {
        if (i < 16 / sizeof(T)) {
          EXPECT_TRUE(std::isnan(float(got[i])));
        } else {
          EXPECT_EQ(float(got[i]), 2.0f);
        }
      }
    }
  }
}

TEST(ChooseAllReduceTest, TakesWhatHasTheForm) {
  const ExchangeLayout layout{.one_shot_bytes = 64 << 10, .two_shot_bytes = 1 << 20};
  AllReduceArgs args;
  args.rows = 1;
  args.hidden = 4096;
  EXPECT_EQ(ChooseAllReduce(args, layout, 4), AllReducePath::kOneShot);
  args.rows = 9;
  EXPECT_EQ(ChooseAllReduce(args, layout, 4), AllReducePath::kTwoShot);
  EXPECT_EQ(ChooseAllReduce(args, layout, 2), AllReducePath::kOneShot);
  args.rows = 100'000;  // in pieces
  EXPECT_EQ(ChooseAllReduce(args, layout, 4), AllReducePath::kTwoShot);
  args.rows = 1;
  args.hidden = 4100;  // not whole vectors
  args.slots = reinterpret_cast<const int32_t*>(256);
  EXPECT_EQ(ChooseAllReduce(args, layout, 4), AllReducePath::kNone);
  args.slots = nullptr;
  EXPECT_EQ(ChooseAllReduce(args, layout, 4), AllReducePath::kOneShot);
  args.type = Type::kE4M3;
  EXPECT_EQ(ChooseAllReduce(args, layout, 4), AllReducePath::kNone);
  EXPECT_EQ(AllReduce({}, Peers{.size = 4}, layout, AllReducePath::kOneShot, args),
            cudaErrorInvalidValue);
}

TEST(SmallAllGatherTest, BringsAnyBitsInRankOrder) {
  for (const int size : {2, 3, 8}) {
    // 150,004: in pieces.
    VirtualRanks ranks(size, ExchangeLayout{.gather_bytes = 64 << 10});
    std::mt19937 generator(7);
    for (const size_t bytes : {4u, 8u, 12u, 1024u, 16380u, 65536u, 8u, 150'004u, 4u, 512u}) {
      if (SanitizerRun() && bytes > 4096) continue;
      std::vector<Guarded> in, out;
      std::vector<uint32_t> expected;
      for (int r = 0; r < size; ++r) {
        ranks.Use(r);
        std::vector<uint32_t> mine(bytes / 4);
        for (uint32_t& w : mine) {
          const uint32_t draw = generator();
          w = draw % 4 == 0 ? 0xFFFFFFFFu : draw % 4 == 1 ? 0 : draw % 4 == 2 ? draw % 16 : draw;
        }
        expected.insert(expected.end(), mine.begin(), mine.end());
        in.emplace_back(bytes);
        in[r].Set(mine);
        out.emplace_back(bytes * size);
      }
      for (int r = 0; r < size; ++r) {
        ranks.Use(r);
        ASSERT_CUDA(SmallAllGather(ranks.launch(r), ranks.peers(r), ranks.layout(), in[r].get(),
                                   out[r].get(), bytes));
      }
      ranks.Synchronize();
      if (::testing::Test::HasFatalFailure()) return;
      for (int r = 0; r < size; ++r) {
        ranks.Use(r);
        ASSERT_EQ(out[r].Get<uint32_t>(), expected) << "rank " << r << ", " << bytes << " bytes";
        ASSERT_TRUE(out[r].GuardsIntact());
      }
    }
    EXPECT_EQ(SmallAllGather(ranks.launch(0), ranks.peers(0), ranks.layout(), nullptr, nullptr, 6),
              cudaErrorInvalidValue);
  }
}

// In a process of its own: the trap takes the context with it.
[[noreturn]] void WaitForAMissingRank() {
  VirtualRanks ranks(3, ExchangeLayout{});
  ranks.set_patience_ns(30'000'000);
  std::vector<Guarded> data;
  for (int r = 0; r < 3; ++r) {
    ranks.Use(r);
    data.emplace_back(8192);
    data[r].Set(std::vector<float>(2048, 1.0f));
  }
  for (const int r : {0, 2}) {
    ranks.Use(r);
    AllReduceArgs args;
    args.type = Type::kF32;
    args.rows = 1;
    args.hidden = 2048;
    args.in = args.out = data[r].get();
    AllReduce(ranks.launch(r), ranks.peers(r), ranks.layout(), AllReducePath::kOneShot, args);
  }
  ranks.ReportFault();
}

TEST(AllReduceDeathTest, NamesTheRankThatDidNotCome) {
  if (SanitizerRun()) return;  // a trap is a report there
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(WaitForAMissingRank(), ::testing::ExitedWithCode(0),
              "failed 1 code 1 exchange 0 rank 1");
}

}  // namespace
}  // namespace lockstep::kernels
