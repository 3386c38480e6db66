#include "kernels/norm.h"
#include "tests/kernels/device_rows.h"
#include "tests/kernels/product_scales.h"

namespace lockstep::kernels {
namespace {

using Doubles = std::vector<double>;

struct HostNorm {
  NormKind kind = NormKind::kNone;
  std::vector<float> weight, bias;  // empty: null
  float eps = 1e-5f;
  bool plus_one = false;
};

void ApplyNorm(const HostNorm& norm, Doubles& v) {
  if (norm.kind == NormKind::kNone) return;
  const double n = static_cast<double>(v.size());
  double mean = 0, squares = 0;
  if (norm.kind == NormKind::kLayer) {
    for (const double x : v) mean += x / n;
  }
  for (const double x : v) squares += (x - mean) * (x - mean) / n;
  for (size_t i = 0; i < v.size(); ++i) {
    v[i] = (v[i] - mean) / std::sqrt(squares + norm.eps);
    if (!norm.weight.empty()) v[i] *= norm.weight[i] + (norm.plus_one ? 1.0 : 0.0);
    if (!norm.bias.empty()) v[i] += norm.bias[i];
  }
}

struct Variant {
  const char* name;
  NormKind post = NormKind::kNone;
  NormKind next = NormKind::kRms;
  bool plus_one = false;
  bool weights = true;
  bool bias = false;
  bool norm_is_residual = false;
  bool padding = false;
  int shift = 0;  // elements off the aligned address
  float magnitude = 2.0f;
  bool scaled = false;  // x lacks its product's scales: bf16 alone
  bool parts = false;   // x is still in parts
};

constexpr Variant kVariants[] = {
    {.name = "Llama"},
    {.name = "LlamaWithPadding", .padding = true},
    {.name = "Gemma", .post = NormKind::kRms, .plus_one = true},
    {.name = "Opt", .next = NormKind::kLayer, .bias = true},
    {.name = "OptNormAfter", .next = NormKind::kLayer, .bias = true, .norm_is_residual = true},
    {.name = "NoTensors", .next = NormKind::kLayer, .weights = false},
    {.name = "NoNorm", .next = NormKind::kNone, .bias = true, .padding = true},
    {.name = "Unaligned", .bias = true, .padding = true, .shift = 1},
    {.name = "PostLayer", .post = NormKind::kLayer, .shift = 3},
    {.name = "Tiny", .magnitude = 1e-4f},
    {.name = "Scaled", .scaled = true},
    {.name = "ScaledWithPadding", .padding = true, .scaled = true},
    {.name = "ScaledGemma", .post = NormKind::kRms, .plus_one = true, .scaled = true},
    {.name = "ScaledOpt", .next = NormKind::kLayer, .bias = true, .scaled = true},
    {.name = "ScaledUnaligned", .bias = true, .shift = 1, .scaled = true},
    {.name = "Parts", .parts = true},
    {.name = "PartsWithPadding", .padding = true, .parts = true},
    {.name = "PartsGemma", .post = NormKind::kRms, .plus_one = true, .parts = true},
    {.name = "PartsOpt", .next = NormKind::kLayer, .bias = true, .parts = true},
    {.name = "PartsUnaligned", .bias = true, .shift = 1, .parts = true},
    {.name = "ScaledParts", .scaled = true, .parts = true},
    {.name = "ScaledPartsOpt",
     .next = NormKind::kLayer,
     .bias = true,
     .scaled = true,
     .parts = true},
};

template <typename T>
class NormTest : public testing::Test {};
using Types = testing::Types<float, __half, __nv_bfloat16>;
TYPED_TEST_SUITE(NormTest, Types);

template <typename T>
struct DeviceNorm {
  DeviceNorm(const HostNorm& host, int hidden, int shift)
      : weight(host.weight.empty() ? std::vector<float>(hidden) : host.weight, shift),
        bias(host.bias.empty() ? std::vector<float>(hidden) : host.bias, shift) {
    spec = {.kind = host.kind,
            .weight = host.weight.empty() ? nullptr : weight.get(),
            .bias = host.bias.empty() ? nullptr : bias.get(),
            .eps = host.eps,
            .plus_one = host.plus_one};
  }
  DeviceRows<T> weight, bias;
  NormSpec spec;
};

template <typename T>
HostNorm MakeNorm(NormKind kind, const Variant& variant, int hidden, uint32_t seed) {
  HostNorm norm;
  norm.kind = kind;
  norm.plus_one = variant.plus_one && kind == NormKind::kRms;
  if (kind == NormKind::kNone || !variant.weights) return norm;
  norm.weight = RandomValues<T>(hidden, seed);
  if (kind == NormKind::kLayer) norm.bias = RandomValues<T>(hidden, seed + 1);
  return norm;
}

template <typename T>
void ExpectNear(float got, double want, double magnitude, const std::string& where) {
  ASSERT_LE(std::abs(got - want), HalfUlp<T>() * std::abs(want) + 3e-6 * magnitude)
      << where << ": " << got << " against " << want;
}

template <typename T>
void CheckReduceTail(const Variant& variant, int rows, int hidden) {
  const std::string where =
      std::string(variant.name) + " " + std::to_string(rows) + " x " + std::to_string(hidden);
  const int64_t n = int64_t{rows} * hidden;
  const std::vector<float> x =
      variant.parts ? RandomValues<float>(kProductParts * n, 1, variant.magnitude / kProductParts)
                    : RandomValues<T>(n, 1, variant.magnitude);
  const std::vector<float> residual = RandomValues<T>(n, 2, variant.magnitude);
  const std::vector<float> bias = RandomValues<T>(hidden, 3);
  const HostNorm post = MakeNorm<T>(variant.post, variant, hidden, 4);
  const HostNorm next = MakeNorm<T>(variant.next, variant, hidden, 6);
  const DeviceNorm<T> device_post(post, hidden, variant.shift);
  const DeviceNorm<T> device_next(next, hidden, variant.shift);
  std::vector<int32_t> slots(rows);
  for (int r = 0; r < rows; ++r) slots[r] = r % 3 == 1 ? -1 : r;
  const DeviceRows<int32_t> slot(rows);
  ASSERT_CUDA(cudaMemcpy(slot.get(), slots.data(), rows * 4, cudaMemcpyHostToDevice));

  const LeftScales scales(rows, hidden, 8);
  const DeviceRows<T> whole(variant.parts ? std::vector<float>() : x, variant.shift);
  const DeviceRows<float> parts(variant.parts ? x : std::vector<float>(), variant.shift);
  const DeviceRows<T> old(residual, variant.shift);
  const DeviceRows<T> added(bias, variant.shift);
  const DeviceRows<T> out(n, variant.shift), normed(n, variant.shift);
  ReduceTailArgs args;
  args.type = TypeOf<T>();
  args.num_rows = rows;
  args.hidden = hidden;
  args.slot = variant.padding ? slot.get() : nullptr;
  if (variant.parts) {
    args.x_parts = parts.get();
  } else {
    args.x = whole.get();
  }
  if (variant.scaled) args.x_scales = scales.get();
  args.bias = variant.bias ? added.get() : nullptr;
  args.post = device_post.spec;
  args.residual_in = old.get();
  args.residual_out = out.get();
  args.next = device_next.spec;
  args.norm_is_residual = variant.norm_is_residual;
  args.normed = normed.get();
  ASSERT_CUDA(ReduceTail({}, args));
  ASSERT_CUDA(cudaDeviceSynchronize());
  out.ExpectGuards(where);
  normed.ExpectGuards(where);

  const std::vector<T> got_residual = out.Bits(), got_normed = normed.Bits();
  for (int r = 0; r < rows; ++r) {
    const int64_t begin = int64_t{r} * hidden;
    if (variant.padding && slots[r] < 0) {
      for (int i = 0; i < hidden; ++i) {
        ASSERT_TRUE(DeviceRows<T>::Untouched(got_residual[begin + i])) << where;
        ASSERT_TRUE(DeviceRows<T>::Untouched(got_normed[begin + i])) << where;
      }
      continue;
    }
    Doubles v(hidden);
    for (int i = 0; i < hidden; ++i) {
      v[i] = x[begin + i];
      for (int p = 1; variant.parts && p < kProductParts; ++p) v[i] += x[p * n + begin + i];
      v[i] = v[i] * (variant.scaled ? scales.Of(r, i) : 1.0f) + (variant.bias ? bias[i] : 0.0);
    }
    ApplyNorm(post, v);
    for (int i = 0; i < hidden; ++i) v[i] += residual[begin + i];
    if (!variant.norm_is_residual) {
      for (int i = 0; i < hidden; ++i) {
        const float got = HostFloat(got_residual[begin + i]);
        ExpectNear<T>(got, v[i], 4.0, where + " residual");
        v[i] = got;  // what the norm is of
      }
    } else {
      for (double& d : v) d = HostRounded<T>(static_cast<float>(d));
    }
    ApplyNorm(next, v);
    // Where the rounded sum is not seen, ours may differ from it in f16's last place.
    const bool unseen = variant.norm_is_residual && std::is_same_v<T, __half>;
    const double slack = unseen ? 2000.0 : 10.0;
    for (int i = 0; i < hidden; ++i) {
      ExpectNear<T>(HostFloat(got_normed[begin + i]), v[i], slack, where + " normed");
      if (variant.norm_is_residual) {
        ASSERT_EQ(HostFloat(got_normed[begin + i]), HostFloat(got_residual[begin + i])) << where;
      }
      if (testing::Test::HasFatalFailure()) return;
    }
  }
}

std::vector<int> Widths() {
  if (SanitizerRun()) return {7, 64, 1000, 4096};
  return {1, 2, 7, 8, 64, 100, 129, 768, 1000, 2048, 2049, 4096, 5120, 8192, 12288, 16383, 16384};
}

TYPED_TEST(NormTest, AddsNormsAndRounds) {
  for (const Variant& variant : kVariants) {
    if (variant.scaled && TypeOf<TypeParam>() != Type::kBF16) continue;
    for (const int hidden : Widths()) {
      CheckReduceTail<TypeParam>(variant, hidden > 4096 ? 2 : 5, hidden);
      if (this->HasFatalFailure()) return;
    }
  }
}

TYPED_TEST(NormTest, NormsAnArrayInPlaceAndApart) {
  for (const int hidden : {1, 33, 4096}) {
    const std::vector<float> x = RandomValues<TypeParam>(3 * hidden, 9);
    Variant variant = {.name = "Norm", .plus_one = true};
    const HostNorm norm = MakeNorm<TypeParam>(NormKind::kRms, variant, hidden, 11);
    const DeviceNorm<TypeParam> device(norm, hidden, 0);
    const DeviceRows<TypeParam> in(x), out(3 * hidden);
    NormArgs args = {.type = TypeOf<TypeParam>(),
                     .num_rows = 3,
                     .hidden = hidden,
                     .x = in.get(),
                     .norm = device.spec,
                     .normed = out.get()};
    ASSERT_CUDA(Norm({}, args));
    args.normed = in.get();
    ASSERT_CUDA(Norm({}, args));
    ASSERT_CUDA(cudaDeviceSynchronize());
    in.ExpectGuards("in place");
    out.ExpectGuards("apart");
    const std::vector<float> got = out.Values(), in_place = in.Values();
    for (int r = 0; r < 3; ++r) {
      Doubles v(x.begin() + r * hidden, x.begin() + (r + 1) * hidden);
      ApplyNorm(norm, v);
      for (int i = 0; i < hidden; ++i) {
        ExpectNear<TypeParam>(got[r * hidden + i], v[i], 4.0, "norm");
        ASSERT_EQ(got[r * hidden + i], in_place[r * hidden + i]);
      }
    }
  }
}

TYPED_TEST(NormTest, ScalesEmbeddingsAndAddsLearnedPositions) {
  for (const int hidden : {5, 1024}) {
    const int rows = 4;
    const float scale = 33.9411255f;  // sqrt(1152): not a bf16
    const std::vector<float> x = RandomValues<TypeParam>(rows * hidden, 21, 0.1f);
    const std::vector<float> table = RandomValues<TypeParam>(10 * hidden, 22);
    Variant variant = {.name = "Embed"};
    const HostNorm norm = MakeNorm<TypeParam>(NormKind::kLayer, variant, hidden, 23);
    const DeviceNorm<TypeParam> device(norm, hidden, 0);
    const std::vector<int32_t> slots = {3, -1, 0, 2}, positions = {7, 0, 0, 4};
    const DeviceRows<int32_t> slot(rows), position(rows);
    ASSERT_CUDA(cudaMemcpy(slot.get(), slots.data(), rows * 4, cudaMemcpyHostToDevice));
    ASSERT_CUDA(cudaMemcpy(position.get(), positions.data(), rows * 4, cudaMemcpyHostToDevice));
    const DeviceRows<TypeParam> in(x), at(table), residual(rows * hidden), normed(rows * hidden);
    AfterEmbedArgs args;
    args.type = TypeOf<TypeParam>();
    args.num_rows = rows;
    args.hidden = hidden;
    args.rows = {.slot = slot.get(), .position = position.get()};
    args.x = in.get();
    args.scale = scale;
    args.position_table = at.get();
    args.position_offset = 2;
    args.norm = device.spec;
    args.residual = residual.get();
    args.normed = normed.get();
    ASSERT_CUDA(AfterEmbed({}, args));
    ASSERT_CUDA(cudaDeviceSynchronize());
    residual.ExpectGuards("residual");
    normed.ExpectGuards("normed");
    const std::vector<TypeParam> got = residual.Bits(), got_normed = normed.Bits();
    for (int r = 0; r < rows; ++r) {
      Doubles v(hidden);
      for (int i = 0; i < hidden; ++i) {
        const int at_row = r * hidden + i;
        if (slots[r] < 0) {
          ASSERT_TRUE(DeviceRows<TypeParam>::Untouched(got[at_row]));
          ASSERT_TRUE(DeviceRows<TypeParam>::Untouched(got_normed[at_row]));
          continue;
        }
        const double want = double{x[at_row]} * HostRounded<TypeParam>(scale) +
                            table[(positions[r] + 2) * hidden + i];
        ExpectNear<TypeParam>(HostFloat(got[at_row]), want, 4.0, "embedded");
        v[i] = HostFloat(got[at_row]);
      }
      if (slots[r] < 0) continue;
      ApplyNorm(norm, v);
      for (int i = 0; i < hidden; ++i) {
        ExpectNear<TypeParam>(HostFloat(got_normed[r * hidden + i]), v[i], 10.0, "normed");
      }
    }
  }
}

// Batch composition must not show in a row's result, however many rows share the
// device.
TYPED_TEST(NormTest, ARowAloneGivesTheSameBits) {
  using T = TypeParam;
  for (const int hidden : {2048, 4096, 5120, 8192, 16384}) {
    const int rows = SanitizerRun() ? 70 : 600;
    const int64_t n = int64_t{rows} * hidden;
    const DeviceRows<T> x(n), residual(n), out(n), normed(n);
    const DeviceRows<T> weight(RandomValues<T>(hidden, 33));
    const std::vector<float> some_x = RandomValues<T>(hidden, 31);
    const std::vector<float> some_residual = RandomValues<T>(hidden, 32);
    const DeviceRows<T> one_x(some_x), one_residual(some_residual);
    for (const int r : {0, 5, 63, rows - 1}) {  // the rest are the pattern, a number too
      ASSERT_CUDA(cudaMemcpy(x.get() + r * int64_t{hidden}, one_x.get(), hidden * sizeof(T),
                             cudaMemcpyDeviceToDevice));
      ASSERT_CUDA(cudaMemcpy(residual.get() + r * int64_t{hidden}, one_residual.get(),
                             hidden * sizeof(T), cudaMemcpyDeviceToDevice));
    }
    ReduceTailArgs args;
    args.type = TypeOf<T>();
    args.hidden = hidden;
    args.x = x.get();
    args.residual_in = residual.get();
    args.residual_out = out.get();
    args.next = {.kind = NormKind::kRms, .weight = weight.get()};
    args.normed = normed.get();
    std::vector<std::vector<T>> results;
    for (const int count : {1, 6, 64, rows}) {
      args.num_rows = count;
      ASSERT_CUDA(ReduceTail({}, args));
      std::vector<T> row(hidden);
      for (const int r : {0, 5, 63, rows - 1}) {
        if (r >= count) break;
        ASSERT_CUDA(cudaMemcpy(row.data(), normed.get() + r * int64_t{hidden}, hidden * sizeof(T),
                               cudaMemcpyDeviceToHost));
        results.push_back(row);
      }
    }
    for (const std::vector<T>& row : results) {
      ASSERT_EQ(std::memcmp(row.data(), results[0].data(), hidden * sizeof(T)), 0) << hidden;
    }
  }
}

// Each launch depends on the one before through the residual, in place: a kernel
// that did not wait, or ended before its predecessor did, would show.
TYPED_TEST(NormTest, DependentLaunchesGiveWhatPlainOnesGive) {
  const int hidden = 2048, steps = SanitizerRun() ? 5 : 200;
  for (const int rows : {1, 300}) {
    if (rows > 1 && SanitizerRun()) continue;
    const std::vector<float> x = RandomValues<TypeParam>(rows * hidden, 41);
    const std::vector<float> start = RandomValues<TypeParam>(rows * hidden, 42);
    const DeviceRows<TypeParam> weight(RandomValues<TypeParam>(hidden, 43));
    std::vector<float> results[2];
    for (const bool pdl : {false, true}) {
      const DeviceRows<TypeParam> a(x), b(rows * hidden), residual(start);
      cudaStream_t stream;
      cudaGraph_t graph;
      cudaGraphExec_t exec;
      ASSERT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      ReduceTailArgs args;
      args.type = TypeOf<TypeParam>();
      args.num_rows = rows;
      args.hidden = hidden;
      args.residual_in = args.residual_out = residual.get();
      args.next = {.kind = NormKind::kRms, .weight = weight.get()};
      ASSERT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
      for (int i = 0; i < steps; ++i) {
        args.x = (i % 2 == 0 ? a : b).get();
        args.normed = (i % 2 == 0 ? b : a).get();
        ASSERT_CUDA(ReduceTail({.stream = stream, .pdl = pdl}, args));
      }
      ASSERT_CUDA(cudaStreamEndCapture(stream, &graph));
      ASSERT_CUDA(cudaGraphInstantiate(&exec, graph, 0));
      ASSERT_CUDA(cudaGraphLaunch(exec, stream));
      ASSERT_CUDA(cudaStreamSynchronize(stream));
      results[pdl] = residual.Values();
      ASSERT_CUDA(cudaGraphExecDestroy(exec));
      ASSERT_CUDA(cudaGraphDestroy(graph));
      ASSERT_CUDA(cudaStreamDestroy(stream));
    }
    ASSERT_TRUE(results[0] == results[1]) << rows << " rows";
  }
}

TEST(NormLimits, RefusesWhatItCannotDo) {
  const DeviceRows<float> x(16);
  NormArgs args = {
      .type = Type::kF32, .num_rows = 1, .hidden = 16, .x = x.get(), .normed = x.get()};
  args.hidden = 16385;
  EXPECT_EQ(Norm({}, args), cudaErrorInvalidValue);
  args.hidden = 0;
  EXPECT_EQ(Norm({}, args), cudaErrorInvalidValue);
  args.hidden = 16;
  args.type = Type::kE4M3;
  EXPECT_EQ(Norm({}, args), cudaErrorInvalidValue);
  args.type = Type::kF32;
  args.num_rows = 0;
  EXPECT_EQ(Norm({}, args), cudaSuccess);
}

}  // namespace
}  // namespace lockstep::kernels
