// Reduced rows against the definition: the residual bit for bit, what is normed within a
// rounding, alike on every rank; exchanges behind each other, padding, e4m3.
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/row_reduce.h"
#include "tests/kernels/virtual_ranks.h"

namespace lockstep::kernels::testing {
namespace {

using B = __nv_bfloat16;

std::vector<B> Random(size_t count, float spread, std::mt19937* generator) {
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<B> values(count);
  for (B& v : values) v = B(normal(*generator));
  return values;
}

struct Case {
  int size, rows, hidden;
  bool e4m3 = false, bias = false, padding = false, plus_one = false;
};

// Some exchanges behind each other over one layout, each of other rows.
void Check(const Case& c, int exchanges) {
  SCOPED_TRACE(::testing::Message() << c.size << " ranks, " << c.rows << " x " << c.hidden
                                    << (c.e4m3 ? " e4m3" : "") << (c.padding ? " padding" : ""));
  const size_t row_bytes = size_t(c.hidden) * 2;
  const int max_rows = std::max(c.size, (c.rows + 1) / 2 + 3);  // longer ones go in pieces
  const size_t bytes = (RowReduceBytes(max_rows, row_bytes, c.size) + 255) / 256 * 256;
  VirtualRanks ranks(c.size, ExchangeLayout{.offset = bytes});
  std::vector<Guarded> in, residual, normed, values, scales, weight, bias, slots, counter;
  std::mt19937 generator(c.rows * 31 + c.hidden);
  const std::vector<B> w = Random(c.hidden, 1.0f, &generator),
                       b = Random(c.hidden, 1.0f, &generator);
  std::vector<int32_t> slot(c.rows, 3);
  if (c.padding) {
    for (int r = 0; r < c.rows; r += 2) slot[r] = -1;
  }
  const size_t count = size_t(c.rows) * c.hidden;
  for (int r = 0; r < c.size; ++r) {
    ranks.Use(r);
    ASSERT_CUDA(InitRowReduce());
    ASSERT_CUDA(cudaMemset(ranks.peers(r).base[r], 0xFF, bytes));
    in.emplace_back(count * 2);
    residual.emplace_back(count * 2);
    normed.emplace_back(count * 2);
    values.emplace_back(count);
    scales.emplace_back(c.rows * 4);
    weight.emplace_back(c.hidden * 2);
    bias.emplace_back(c.hidden * 2);
    slots.emplace_back(c.rows * 4);
    counter.emplace_back(8);
    weight[r].Set(w);
    bias[r].Set(b);
    slots[r].Set(slot);
    counter[r].Set(std::vector<uint64_t>(1, 0));
  }
  for (int exchange = 0; exchange < exchanges; ++exchange) {
    const std::vector<B> before = Random(count, 1.0f, &generator);
    std::vector<std::vector<B>> sent;
    for (int r = 0; r < c.size; ++r) {
      ranks.Use(r);
      sent.push_back(Random(count, 1.0f, &generator));
      in[r].Set(sent[r]);
      residual[r].Set(before);
    }
    ranks.SynchronizeDevices();
    for (int r = 0; r < c.size; ++r) {
      ranks.Use(r);
      const RowReduce reduce = {.peers = ranks.peers(r),
                                .offset = 0,
                                .max_rows = max_rows,
                                .row_bytes = row_bytes,
                                .counter = static_cast<uint64_t*>(counter[r].get())};
      RowReduceArgs args = {.type = Type::kBF16,
                            .rows = c.rows,
                            .hidden = c.hidden,
                            .in = in[r].get(),
                            .bias = c.bias ? bias[r].get() : nullptr,
                            .residual = residual[r].get(),
                            .norm_weight = weight[r].get(),
                            .plus_one = c.plus_one,
                            .slots = c.padding ? static_cast<int32_t*>(slots[r].get()) : nullptr};
      if (c.e4m3) {
        args.quantized = {values[r].get(), static_cast<float*>(scales[r].get())};
      } else {
        args.normed = normed[r].get();
      }
      ASSERT_CUDA(ReduceRows(ranks.launch(r, exchange % 2 == 1), reduce, args));
    }
    ranks.Synchronize();
    if (::testing::Test::HasFatalFailure()) return;
    std::vector<float> wanted(c.hidden);
    for (int r = 0; r < c.size; ++r) {
      ranks.Use(r);
      const std::vector<B> got_residual = residual[r].Get<B>(), got = normed[r].Get<B>();
      const std::vector<__nv_fp8_e4m3> bytes8 = values[r].Get<__nv_fp8_e4m3>();
      const std::vector<float> got_scales = scales[r].Get<float>();
      const std::vector<__nv_fp8_e4m3> first8 = values[0].Get<__nv_fp8_e4m3>();
      const std::vector<B> first = normed[0].Get<B>();
      for (int row = 0; row < c.rows; ++row) {
        if (slot[row] < 0) continue;
        const bool owns = row % c.size == r;
        double squares = 0;
        for (int i = 0; i < c.hidden; ++i) {
          const size_t at = size_t(row) * c.hidden + i;
          float sum = float(sent[0][at]);
          for (int from = 1; from < c.size; ++from) sum += float(sent[from][at]);
          if (c.bias) sum += float(b[i]);
          sum += float(before[at]);
          const B rounded = B(sum);
          ASSERT_EQ(float(got_residual[at]), float(owns ? rounded : before[at]))
              << "rank " << r << " row " << row << " element " << i;
          wanted[i] = float(rounded);
          squares += double{wanted[i]} * wanted[i];
        }
        const double scale = 1.0 / std::sqrt(squares / c.hidden + 1e-5);
        for (int i = 0; i < c.hidden; ++i) {
          const size_t at = size_t(row) * c.hidden + i;
          const double want = wanted[i] * scale * (float(w[i]) + (c.plus_one ? 1.0 : 0.0));
          if (c.e4m3) {
            ASSERT_EQ(bytes8[at].__x, first8[at].__x);
            ASSERT_NEAR(float(bytes8[at]) * got_scales[row], want,
                        std::abs(want) * 0.07 + got_scales[row] * 0.002)
                << "rank " << r << " row " << row << " element " << i;
          } else {
            ASSERT_EQ(float(got[at]), float(first[at]));
            ASSERT_NEAR(float(got[at]), want, std::abs(want) * 0.009 + 1e-6)
                << "rank " << r << " row " << row << " element " << i;
          }
        }
      }
      for (const auto* each : {&in[r], &residual[r], &normed[r], &values[r], &scales[r]}) {
        ASSERT_TRUE(each->GuardsIntact());
      }
    }
  }
}

TEST(RowReduceTest, MatchesTheDefinition) {
  for (const int size : {2, 3, 4, 8}) {
    for (const bool e4m3 : {false, true}) {
      for (const int rows : {1, 2, 7, 40}) {
        Check({.size = size, .rows = rows, .hidden = 512, .e4m3 = e4m3, .bias = rows == 7}, 3);
        if (::testing::Test::HasFatalFailure()) return;
      }
      if (SanitizerRun()) continue;
      Check({.size = size, .rows = 9, .hidden = 8192, .e4m3 = e4m3, .plus_one = true}, 3);
      Check({.size = size, .rows = 5, .hidden = 5136, .e4m3 = e4m3}, 3);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(RowReduceTest, PaddingIsLeftAlone) {
  for (const bool e4m3 : {false, true}) {
    Check({.size = 4, .rows = 13, .hidden = 256, .e4m3 = e4m3, .padding = true}, 5);
  }
}

TEST(RowReduceTest, ManyRowsBehindEachOther) {
  if (SanitizerRun()) return;
  Check({.size = 2, .rows = 64, .hidden = 4096}, 20);
  Check({.size = 4, .rows = 60, .hidden = 4096, .e4m3 = true}, 20);
}

TEST(RowReduceTest, RefusesWhatItDoesNotTake) {
  RowReduce reduce;
  reduce.max_rows = 4;
  reduce.row_bytes = 1024;
  reduce.peers.size = 2;
  RowReduceArgs args = {.type = Type::kBF16, .rows = 1, .hidden = 512};
  int something = 0;
  args.norm_weight = args.residual = &something;
  EXPECT_TRUE(RowReduceTakes(args, reduce));
  reduce.max_rows = 1;  // fewer than ranks
  EXPECT_FALSE(RowReduceTakes(args, reduce));
  reduce.max_rows = 4;
  args.hidden = 520;  // wider than the region's rows
  EXPECT_FALSE(RowReduceTakes(args, reduce));
  args.hidden = 508;
  EXPECT_FALSE(RowReduceTakes(args, reduce));
  args.hidden = 512;
  args.type = Type::kF32;
  EXPECT_FALSE(RowReduceTakes(args, reduce));
  args.type = Type::kBF16;
  args.norm_weight = nullptr;
  EXPECT_FALSE(RowReduceTakes(args, reduce));
}

}  // namespace
}  // namespace lockstep::kernels::testing
