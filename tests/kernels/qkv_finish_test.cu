#include "kernels/qkv_finish.h"
#include "tests/kernels/device_rows.h"
#include "tests/kernels/product_scales.h"

namespace lockstep::kernels {
namespace {

struct Variant {
  const char* name;
  bool bias, norm, plus_one, rotary;
  int shift;            // elements off the aligned address
  bool scaled = false;  // the product left its scales: bf16 alone
};
constexpr Variant kVariants[] = {
    {"Llama", false, false, false, true, 0},
    {"Qwen2", true, false, false, true, 0},
    {"Qwen3", false, true, false, true, 0},
    {"Gemma3", false, true, true, true, 0},
    {"Opt", true, false, false, false, 0},
    {"Unaligned", true, true, true, true, 1},
    {"NormAlone", false, true, false, false, 0},
    {"ScaledLlama", false, false, false, true, 0, true},
    {"ScaledQwen3", true, true, false, true, 0, true},
    {"ScaledUnaligned", true, false, false, true, 1, true},
};

struct Heads {
  int heads, kv_heads, head_dim, block_size;
};

// e4m3 has half a unit of 2^-10 below its smallest normal.
template <typename Kv>
void ExpectCached(float stored, double want, double scale, const std::string& where) {
  double limit = HalfUlp<Kv>() * std::abs(want) + 3e-5;
  if constexpr (sizeof(Kv) == 1) {
    limit += 0x1p-10 * scale;
    want = std::min(std::max(want, -448.0 * scale), 448.0 * scale);
  }
  ASSERT_LE(std::abs(stored * scale - want), limit)
      << where << ": " << stored << " * " << scale << " against " << want;
}

template <typename T, typename Kv>
void Check(const Variant& variant, const Heads& h, int num_rows) {
  const std::string where = std::string(variant.name) + " head_dim " + std::to_string(h.head_dim) +
                            " heads " + std::to_string(h.heads) + "/" + std::to_string(h.kv_heads);
  constexpr int kSlots = 4, kBlocksOfSlot = 3, kBlocks = kSlots * kBlocksOfSlot;
  const int half = h.head_dim / 2, units = h.heads + 2 * h.kv_heads, width = units * h.head_dim;
  const int stride = width + 16;
  const int max_positions = kBlocksOfSlot * h.block_size;
  const std::vector<float> qkv = RandomValues<T>(num_rows * stride, 1);
  const std::vector<float> bias = RandomValues<T>(width, 2);
  const std::vector<float> q_norm = RandomValues<T>(h.head_dim, 3);
  const std::vector<float> k_norm = RandomValues<T>(h.head_dim, 4);
  std::vector<float> rotary;
  for (int p = 0; p < max_positions; ++p) {
    for (int i = 0; i < half; ++i) {
      const float angle = static_cast<float>(p) * std::pow(1e4f, -static_cast<float>(i) / half);
      rotary.push_back(std::cos(angle));
      rotary.push_back(std::sin(angle));
    }
  }
  std::vector<int32_t> slots = {2, 0, -1, 3, 3, 1};
  std::vector<int32_t> positions = {0, 2 * h.block_size, 0, h.block_size, max_positions - 1, 1};
  if (h.block_size == 1) positions[5] = 2;
  slots.resize(num_rows, -1);
  positions.resize(num_rows, 1 << 30);  // of padding: not looked at
  std::vector<int32_t> blocks(kBlocks);
  for (int i = 0; i < kBlocks; ++i) blocks[i] = (i * 5 + 3) % kBlocks;  // a permutation

  const DeviceRows<int32_t> slot(num_rows), position(num_rows), table(kBlocks);
  ASSERT_CUDA(cudaMemcpy(slot.get(), slots.data(), num_rows * 4, cudaMemcpyHostToDevice));
  ASSERT_CUDA(cudaMemcpy(position.get(), positions.data(), num_rows * 4, cudaMemcpyHostToDevice));
  ASSERT_CUDA(cudaMemcpy(table.get(), blocks.data(), kBlocks * 4, cudaMemcpyHostToDevice));
  const DeviceRows<T> x(qkv, variant.shift), device_bias(bias, variant.shift);
  const DeviceRows<T> device_q_norm(q_norm), device_k_norm(k_norm);
  const DeviceRows<float> turns(rotary);
  const int64_t cached = int64_t{kBlocks} * h.kv_heads * h.block_size * h.head_dim;
  const DeviceRows<Kv> k(cached), v(cached);

  const LeftScales scales(num_rows, width, 5);

  QkvFinishArgs args;
  args.type = TypeOf<T>();
  args.num_rows = num_rows;
  if (variant.scaled) args.scales = scales.get();
  args.rows = {slot.get(), position.get(), table.get(), kBlocksOfSlot};
  args.heads = h.heads;
  args.qkv = x.get();
  args.qkv_stride = stride;
  args.bias = variant.bias ? device_bias.get() : nullptr;
  args.q_norm = variant.norm ? device_q_norm.get() : nullptr;
  args.k_norm = variant.norm ? device_k_norm.get() : nullptr;
  args.norm_plus_one = variant.plus_one;
  args.rotary = variant.rotary ? reinterpret_cast<const float2*>(turns.get()) : nullptr;
  args.kv = {.k = k.get(),
             .v = v.get(),
             .type = TypeOf<Kv>(),
             .kv_heads = h.kv_heads,
             .block_size = h.block_size,
             .head_dim = h.head_dim};
  if (sizeof(Kv) == 1) {
    args.kv.k_scale = 0.004f;  // 448 * 0.004 = 1.79: some values saturate
    args.kv.v_scale = 0.0123f;
  }
  ASSERT_CUDA(QkvFinish({}, args));
  ASSERT_CUDA(cudaDeviceSynchronize());
  x.ExpectGuards(where);
  k.ExpectGuards(where);
  v.ExpectGuards(where);

  const std::vector<float> got = x.Values();
  const std::vector<Kv> got_k = k.Bits(), got_v = v.Bits();
  std::vector<bool> written(cached);
  for (int r = 0; r < num_rows; ++r) {
    for (int i = h.heads * h.head_dim; i < stride; ++i) {
      ASSERT_EQ(got[r * stride + i], qkv[r * stride + i]) << where << ": beside q";
    }
    if (slots[r] < 0) {
      for (int i = 0; i < stride; ++i) {
        ASSERT_EQ(got[r * stride + i], qkv[r * stride + i]) << where << ": padding";
      }
      continue;
    }
    for (int unit = 0; unit < units; ++unit) {
      const bool is_q = unit < h.heads, is_v = unit >= h.heads + h.kv_heads;
      std::vector<double> d(h.head_dim);
      double squares = 0;
      for (int i = 0; i < h.head_dim; ++i) {
        const int at = unit * h.head_dim + i;
        d[i] = double{qkv[r * stride + at]} * (variant.scaled ? scales.Of(r, at) : 1.0f) +
               (variant.bias ? bias[at] : 0.0);
        squares += d[i] * d[i];
      }
      if (variant.norm && !is_v) {
        const double scale = 1.0 / std::sqrt(squares / h.head_dim + 1e-6);
        for (int i = 0; i < h.head_dim; ++i) {
          d[i] *= scale * ((is_q ? q_norm : k_norm)[i] + (variant.plus_one ? 1.0 : 0.0));
        }
      }
      if (variant.rotary && !is_v) {
        for (int i = 0; i < half; ++i) {
          const double c = rotary[2 * (positions[r] * half + i)];
          const double s = rotary[2 * (positions[r] * half + i) + 1];
          const double p = d[i], q = d[i + half];
          d[i] = p * c - q * s;
          d[i + half] = q * c + p * s;
        }
      }
      for (int i = 0; i < h.head_dim; ++i) {
        const int at = r * stride + unit * h.head_dim + i;
        if (is_q) {
          ASSERT_LE(std::abs(got[at] - d[i]), HalfUlp<T>() * std::abs(d[i]) + 3e-5)
              << where << " q " << i << ": " << got[at] << " against " << d[i];
        } else {
          const int head = unit - h.heads - (is_v ? h.kv_heads : 0);
          const int block = blocks[slots[r] * kBlocksOfSlot + positions[r] / h.block_size];
          const int64_t c =
              ((int64_t{block} * h.kv_heads + head) * h.block_size + positions[r] % h.block_size) *
                  h.head_dim +
              i;
          written[c] = true;
          ExpectCached<Kv>(HostFloat((is_v ? got_v : got_k)[c]), d[i],
                           is_v ? args.kv.v_scale : args.kv.k_scale, where + (is_v ? " v" : " k"));
        }
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
  for (int64_t i = 0; i < cached; ++i) {
    if (written[i]) continue;
    ASSERT_TRUE(DeviceRows<Kv>::Untouched(got_k[i])) << where << ": k cache at " << i;
    ASSERT_TRUE(DeviceRows<Kv>::Untouched(got_v[i])) << where << ": v cache at " << i;
  }
}

// All but six are padding; many rows are cut over the device in another way.
std::vector<int> RowCounts() {
  if (SanitizerRun()) return {6, 129};
  return {6, 150};
}

template <typename T>
class QkvFinishTest : public testing::Test {};
using Types = testing::Types<float, __half, __nv_bfloat16>;
TYPED_TEST_SUITE(QkvFinishTest, Types);

std::vector<Heads> Shapes() {
  std::vector<Heads> shapes = {{4, 2, 8, 16}, {32, 8, 128, 16}, {1, 1, 6, 1}, {7, 1, 16, 4}};
  if (SanitizerRun()) return shapes;
  for (const int head_dim : {2, 16, 24, 64, 80, 96, 112, 128, 192, 250, 256}) {
    shapes.push_back({7, 1, head_dim, 16});
    shapes.push_back({3, 3, head_dim, 4});
  }
  return shapes;
}

TYPED_TEST(QkvFinishTest, RotatesAndCachesInTheModelsType) {
  for (const Heads& heads : Shapes()) {
    for (const Variant& variant : kVariants) {
      if (variant.scaled && TypeOf<TypeParam>() != Type::kBF16) continue;
      for (const int num_rows : RowCounts()) Check<TypeParam, TypeParam>(variant, heads, num_rows);
      if (this->HasFatalFailure()) return;
    }
  }
}

TYPED_TEST(QkvFinishTest, CachesScaledE4M3) {
  for (const Heads& heads : Shapes()) {
    for (const Variant& variant : kVariants) {
      if (variant.scaled && TypeOf<TypeParam>() != Type::kBF16) continue;
      for (const int num_rows : RowCounts())
        Check<TypeParam, __nv_fp8_e4m3>(variant, heads, num_rows);
      if (this->HasFatalFailure()) return;
    }
  }
}

TEST(QkvFinishLimits, RefusesWhatItCannotDo) {
  DeviceRows<float> x(1024);
  QkvFinishArgs args;
  args.type = Type::kF32;
  args.num_rows = 1;
  args.heads = 1;
  args.qkv = x.get();
  args.qkv_stride = 1024;
  args.kv = {.type = Type::kF32, .kv_heads = 1, .head_dim = 258};
  EXPECT_EQ(QkvFinish({}, args), cudaErrorInvalidValue);
  args.kv.head_dim = 7;
  EXPECT_EQ(QkvFinish({}, args), cudaErrorInvalidValue);
  args.kv.head_dim = 8;
  args.kv.type = Type::kF16;
  EXPECT_EQ(QkvFinish({}, args), cudaErrorInvalidValue);
  args.kv.type = Type::kF32;
  args.qkv_stride = 23;
  EXPECT_EQ(QkvFinish({}, args), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace lockstep::kernels
