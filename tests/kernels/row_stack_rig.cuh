// Ranks of a small Llama for tests of kernels/row_stack.h, and what it should give: the same
// arithmetic in double, rounded where the kernel rounds. Ranks run beside each other on one GPU.
#ifndef LOCKSTEP_TESTS_KERNELS_ROW_STACK_RIG_CUH_
#define LOCKSTEP_TESTS_KERNELS_ROW_STACK_RIG_CUH_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "kernels/row_stack.h"
#include "tests/kernels/device_rows.h"
#include "tests/kernels/gemv_case.cuh"

namespace lockstep::kernels {

using testing::Memory;

struct Shape {
  int hidden = 256, heads = 4, kv_heads = 2, head_dim = 64, intermediate = 320, vocab = 500;
  int layers = 2, ranks = 1, block_size = 16, window = 0;
  bool rotary = true;
  GemvEpilogue gate = GemvEpilogue::kSiluGate;
  bool plus_one = false;
  int q_width() const { return heads * head_dim; }
  int kv_width() const { return kv_heads * head_dim; }
  int qkv_width() const { return q_width() + 2 * kv_width(); }
};

inline constexpr int kSlots = 2, kSlot = 1, kPositions = 4096;

// A window of these, from where one likes, is a row of noise: drawing each number would take most
// of a test's time.
inline const std::vector<float>& Normals() {
  static const std::vector<float> normals = [] {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    std::vector<float> values(1 << 17);
    for (float& v : values) v = normal(random);
    return values;
  }();
  return normals;
}

// A matrix on the device and as the numbers that it stands for.
template <typename W>
struct Matrix {
  int n, k;
  std::vector<float> values;
  std::unique_ptr<Memory> weights, scales;

  Matrix(int n, int k, float size, std::mt19937* random) : n(n), k(k), values(size_t(n) * k) {
    std::uniform_real_distribution<float> spread(0.5f, 2.0f);
    std::vector<W> stored(values.size());
    std::vector<float> row_scales(n, 1.0f);
    for (int i = 0; i < n; ++i) {
      const float factor = size / std::sqrt(static_cast<float>(k));
      if (sizeof(W) == 1) row_scales[i] = factor * spread(*random);
      const float* const noise = Normals().data() + (*random)() % (Normals().size() - k);
      for (int j = 0; j < k; ++j) {
        const float v = noise[j] * (sizeof(W) == 1 ? 1.0f : factor);
        const size_t at = size_t(i) * k + j;
        stored[at] = static_cast<W>(v);
        values[at] = HostFloat(stored[at]) * row_scales[i];
      }
    }
    weights = std::make_unique<Memory>(stored.size() * sizeof(W));
    weights->Write(stored);
    scales = std::make_unique<Memory>(row_scales.size() * sizeof(float));
    scales->Write(row_scales);
  }
  std::vector<double> Times(const std::vector<double>& x) const {
    std::vector<double> out(n);
    for (int i = 0; i < n; ++i) {
      double sum = 0;
      for (int j = 0; j < k; ++j) sum += double{values[size_t(i) * k + j]} * x[j];
      out[i] = sum;
    }
    return out;
  }
  StackMatrix on_device() const {
    return {weights->template get<void>(), scales->template get<float>()};
  }
};

template <typename T>
double Round(double v) {
  return HostFloat(static_cast<T>(static_cast<float>(v)));
}
template <typename T>
std::vector<double> Rounded(std::vector<double> v) {
  for (double& e : v) e = Round<T>(e);
  return v;
}

// What a rank has of the model, its cache (on the device and, as numbers, here) and its row.
template <typename W, typename T, typename KV>
class Rank {
 public:
  Rank(const Shape& s, std::mt19937* random) : s_(s), head_(s.vocab, s.hidden, 2.0f, random) {
    for (int l = 0; l < s.layers; ++l) {
      qkv_.emplace_back(s.qkv_width(), s.hidden, 1.5f, random);
      o_.emplace_back(s.hidden, s.q_width(), 1.0f, random);
      up_.emplace_back(2 * s.intermediate, s.hidden, 1.5f, random);
      down_.emplace_back(s.hidden, s.intermediate, 1.0f, random);
    }
    blocks_ = kPositions / s.block_size;
    table_.resize(size_t(kSlots) * blocks_);
    for (size_t i = 0; i < table_.size(); ++i) table_[i] = static_cast<int32_t>(i);
    std::shuffle(table_.begin(), table_.end(), *random);
    table_memory_ = Upload(table_);
    const size_t half = table_.size() * s.block_size * s.kv_width();
    std::normal_distribution<float> normal;
    for (int l = 0; l < s.layers; ++l) {
      for (int part = 0; part < 2; ++part) {
        std::vector<KV> cache(half);
        for (KV& v : cache) v = static_cast<KV>(normal(*random));
        cache_.push_back(cache);
        cache_memory_.push_back(Upload(cache));
      }
    }
    logits_ = std::make_unique<Memory>(s.vocab * sizeof(float));
  }

  template <typename V>
  static std::unique_ptr<Memory> Upload(const std::vector<V>& values) {
    auto memory = std::make_unique<Memory>(values.size() * sizeof(V));
    memory->Write(values);
    return memory;
  }
  size_t CacheIndex(int head, int position) const {
    const int64_t block = table_[size_t(kSlot) * blocks_ + position / s_.block_size];
    return size_t((block * s_.kv_heads + head) * s_.block_size + position % s_.block_size) *
           s_.head_dim;
  }
  KvLayer kv(int layer) const {
    return {.k = cache_memory_[2 * layer]->template get<void>(),
            .v = cache_memory_[2 * layer + 1]->template get<void>(),
            .type = TypeOf<KV>(),
            .kv_heads = s_.kv_heads,
            .block_size = s_.block_size,
            .head_dim = s_.head_dim,
            .k_scale = kKScale,
            .v_scale = kVScale};
  }
  // heads of the normed row; the cache takes the row's own k and v.
  std::vector<double> Attend(int layer, int position, const std::vector<double>& normed,
                             const std::vector<float2>& rotary) {
    std::vector<double> qkv = Rounded<T>(qkv_[layer].Times(normed));
    const int d = s_.head_dim;
    for (int h = 0; h < s_.heads + s_.kv_heads && s_.rotary; ++h) {
      for (int i = 0; i < d / 2; ++i) {
        const float2 r = rotary[size_t(position) * (d / 2) + i];
        const double a = qkv[h * d + i], b = qkv[h * d + i + d / 2];
        qkv[h * d + i] = a * r.x - b * r.y;
        qkv[h * d + i + d / 2] = b * r.x + a * r.y;
      }
    }
    for (int part = 0; part < 2; ++part) {
      const float scale = sizeof(KV) == 1 ? (part == 0 ? kKScale : kVScale) : 1.0f;
      for (int h = 0; h < s_.kv_heads; ++h) {
        for (int i = 0; i < d; ++i) {
          const double v = qkv[s_.q_width() + part * s_.kv_width() + h * d + i];
          cache_[2 * layer + part][CacheIndex(h, position) + i] =
              static_cast<KV>(static_cast<float>(v) / scale);
        }
      }
    }
    std::vector<double> out(s_.q_width());
    const int begin = s_.window > 0 ? std::max(0, position + 1 - s_.window) : 0;
    for (int h = 0; h < s_.heads; ++h) {
      const int kv_head = h / (s_.heads / s_.kv_heads);
      std::vector<double> weight;
      double top = -INFINITY, sum = 0;
      for (int p = begin; p <= position; ++p) {
        double score = 0;
        for (int i = 0; i < d; ++i)
          score +=
              Round<T>(qkv[h * d + i]) * HostFloat(cache_[2 * layer][CacheIndex(kv_head, p) + i]);
        score *= kScale * (sizeof(KV) == 1 ? kKScale : 1.0f);
        weight.push_back(score);
        top = std::max(top, score);
      }
      for (double& w : weight) sum += w = std::exp(w - top);
      for (int p = begin; p <= position; ++p) {
        for (int i = 0; i < d; ++i)
          out[h * d + i] += weight[p - begin] / sum * (sizeof(KV) == 1 ? kVScale : 1.0f) *
                            HostFloat(cache_[2 * layer + 1][CacheIndex(kv_head, p) + i]);
      }
    }
    return Rounded<T>(out);
  }
  std::vector<double> Output(int layer, const std::vector<double>& heads) const {
    return Rounded<T>(o_[layer].Times(heads));
  }
  std::vector<double> Mlp(int layer, const std::vector<double>& normed) const {
    const std::vector<double> both = up_[layer].Times(normed);
    std::vector<double> activated(s_.intermediate);
    for (int i = 0; i < s_.intermediate; ++i) {
      const double g = both[2 * i];
      const double gated =
          s_.gate == GemvEpilogue::kSiluGate
              ? g / (1 + std::exp(-g))
              : 0.5 * g * (1 + std::tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)));
      activated[i] = Round<T>(gated * both[2 * i + 1]);
    }
    return Rounded<T>(down_[layer].Times(activated));
  }
  std::vector<double> Head(const std::vector<double>& normed) const { return head_.Times(normed); }

  // The cache as it should be but for what is stored last, and may be rounded otherwise.
  double LargestCacheError(int layer) const {
    double largest = 0;
    for (int part = 0; part < 2; ++part) {
      const std::vector<KV> got = cache_memory_[2 * layer + part]->template Read<KV>();
      for (size_t i = 0; i < got.size(); ++i) {
        const double want = HostFloat(cache_[2 * layer + part][i]);
        largest = std::max(largest, std::abs(HostFloat(got[i]) - want) / (1 + std::abs(want)));
      }
    }
    return largest;
  }
  bool GuardsIntact() const {
    bool intact = logits_->GuardsIntact() && workspace_->GuardsIntact() && region_->GuardsIntact();
    for (const auto& memory : cache_memory_) intact &= memory->GuardsIntact();
    return intact;
  }

  static constexpr float kScale = 0.15f, kKScale = 0.5f, kVScale = 2.0f;

  const Shape s_;
  std::vector<Matrix<W>> qkv_, o_, up_, down_;
  Matrix<T> head_;
  int blocks_ = 0;
  std::vector<int32_t> table_;
  std::unique_ptr<Memory> table_memory_, logits_, workspace_, region_;
  std::vector<std::vector<KV>> cache_;  // k and v of each layer in turn
  std::vector<std::unique_ptr<Memory>> cache_memory_;
};

template <typename W, typename T, typename KV>
class Group {
 public:
  explicit Group(const Shape& s) : s_(s), random_(7) {
    EXPECT_CUDA(InitRowStack());
    for (int r = 0; r < s.ranks; ++r) ranks_.emplace_back(s, &random_);
    std::uniform_real_distribution<float> around(0.5f, 1.5f);
    for (int i = 0; i < 2 * s.layers + 1; ++i) {
      std::vector<T> norm(s.hidden);
      for (T& v : norm) v = static_cast<T>(around(random_) - (s.plus_one ? 1.0f : 0.0f));
      norms_.push_back(norm);
      norm_memory_.push_back(Rank<W, T, KV>::Upload(norm));
    }
    for (int p = 0; p < kPositions; ++p) {
      for (int i = 0; i < s.head_dim / 2; ++i) {
        const double angle = p * std::pow(10000.0, -2.0 * i / s.head_dim);
        rotary_.push_back(
            {static_cast<float>(std::cos(angle)), static_cast<float>(std::sin(angle))});
      }
    }
    rotary_memory_ = Rank<W, T, KV>::Upload(rotary_);
    residual_ = std::make_unique<Memory>(s.hidden * sizeof(T));
    rows_ = std::make_unique<Memory>(2 * sizeof(int32_t));
    int sms = 0;
    EXPECT_CUDA(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    for (int r = 0; r < s.ranks; ++r) {
      Rank<W, T, KV>& rank = ranks_[r];
      rank.region_ = std::make_unique<Memory>(GemvExchangeBytes(s.ranks, s.hidden));
      streams_.emplace_back();
      EXPECT_CUDA(cudaStreamCreateWithFlags(&streams_.back(), cudaStreamNonBlocking));
    }
    for (int r = 0; r < s.ranks; ++r) {
      GemvExchange exchange;
      for (int other = 0; other < s.ranks; ++other)
        exchange.peers.base[other] = ranks_[other].region_->template get<std::byte>();
      exchange.peers.rank = r;
      exchange.peers.size = s.ranks;
      exchange.width = s.hidden;
      EXPECT_CUDA(ClearGemvExchange(exchange, streams_[r]));
      exchanges_.push_back(exchange);
    }
    for (int r = 0; r < s.ranks; ++r) {
      Rank<W, T, KV>& rank = ranks_[r];
      std::vector<StackLayer> layers(s.layers);
      for (int l = 0; l < s.layers; ++l) {
        layers[l] = {.qkv = rank.qkv_[l].on_device(),
                     .o = rank.o_[l].on_device(),
                     .gate_up = rank.up_[l].on_device(),
                     .down = rank.down_[l].on_device(),
                     .attention_norm = norm_memory_[2 * l]->template get<void>(),
                     .mlp_norm = norm_memory_[2 * l + 1]->template get<void>(),
                     .kv = rank.kv(l),
                     .rotary = s.rotary ? rotary_memory_->template get<float2>() : nullptr,
                     .scale = rank.kScale,
                     .window = s.window};
      }
      layers_.push_back(layers);
    }
    for (int r = 0; r < s.ranks; ++r) {
      Rank<W, T, KV>& rank = ranks_[r];
      RowStackArgs args = {.type = TypeOf<T>(),
                           .weight_type = TypeOf<W>(),
                           .hidden = s.hidden,
                           .heads = s.heads,
                           .intermediate = s.intermediate,
                           .vocab = s.vocab,
                           .gate = s.gate,
                           .norm_eps = 1e-5f,
                           .norm_plus_one = s.plus_one,
                           .layers = layers_[r].data(),
                           .num_layers = s.layers,
                           .final_norm = norm_memory_.back()->template get<void>(),
                           .head = rank.head_.weights->template get<void>(),
                           .exchange = &exchanges_[r],
                           .max_blocks = sms / s.ranks};
      args.rows = {.slot = rows_->template get<int32_t>(),
                   .position = rows_->template get<int32_t>() + 1,
                   .block_table = rank.table_memory_->template get<int32_t>(),
                   .table_stride = rank.blocks_};
      args.residual = residual_->template get<void>();
      args.logits = rank.logits_->template get<float>();
      rank.workspace_ = std::make_unique<Memory>(RowStackBytes(args));
      args.workspace = rank.workspace_->template get<void>();
      EXPECT_CUDA(ClearRowStack(args, streams_[r]));
      args_.push_back(args);
    }
    Synchronize();
  }
  ~Group() {
    for (cudaStream_t stream : streams_) cudaStreamDestroy(stream);
  }

  void Synchronize() {
    for (cudaStream_t stream : streams_) ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  }
  void Launch(int slot, int position, const std::vector<T>& residual) {
    residual_->Write(residual);
    rows_->Write(std::vector<int32_t>{slot, position});
    EXPECT_CUDA(cudaDeviceSynchronize());
    for (int r = 0; r < s_.ranks; ++r) EXPECT_CUDA(RowStack({.stream = streams_[r]}, args_[r]));
    Synchronize();
  }
  std::vector<T> RandomRow() {
    std::normal_distribution<float> normal;
    std::vector<T> row(s_.hidden);
    for (T& v : row) v = static_cast<T>(normal(random_));
    return row;
  }

  std::vector<double> Norm(const std::vector<double>& x, int which) const {
    double squares = 0;
    for (double v : x) squares += v * v;
    const double scale = 1 / std::sqrt(squares / x.size() + 1e-5);
    std::vector<double> out(x.size());
    for (size_t i = 0; i < x.size(); ++i)
      out[i] = Round<T>(x[i] * scale * (HostFloat(norms_[which][i]) + (s_.plus_one ? 1 : 0)));
    return out;
  }
  void Add(const std::vector<std::vector<double>>& parts, std::vector<double>* x) const {
    for (size_t i = 0; i < x->size(); ++i) {
      double sum = 0;
      for (const std::vector<double>& part : parts) sum += part[i];
      (*x)[i] = Round<T>(sum + (*x)[i]);
    }
  }
  // The logits of every rank.
  std::vector<std::vector<double>> Expect(int position, const std::vector<T>& residual) {
    std::vector<double> x;
    for (const T& v : residual) x.push_back(HostFloat(v));
    for (int l = 0; l < s_.layers; ++l) {
      std::vector<std::vector<double>> parts;
      std::vector<double> normed = Norm(x, 2 * l);
      for (auto& rank : ranks_)
        parts.push_back(rank.Output(l, rank.Attend(l, position, normed, rotary_)));
      Add(parts, &x);
      normed = Norm(x, 2 * l + 1);
      parts.clear();
      for (auto& rank : ranks_) parts.push_back(rank.Mlp(l, normed));
      Add(parts, &x);
    }
    std::vector<std::vector<double>> logits;
    const std::vector<double> normed = Norm(x, 2 * s_.layers);
    for (auto& rank : ranks_) logits.push_back(rank.Head(normed));
    return logits;
  }
  std::vector<float> Logits(int rank) const { return ranks_[rank].logits_->template Read<float>(); }
  std::vector<uint8_t> Workspace(int rank) const {
    return ranks_[rank].workspace_->template Read<uint8_t>();
  }

  // One step; the logits' error in units of their own spread.
  void Check(int position, double bound) {
    const std::vector<T> residual = RandomRow();
    Launch(kSlot, position, residual);
    const std::vector<std::vector<double>> want = Expect(position, residual);
    for (int r = 0; r < s_.ranks; ++r) {
      const std::vector<float> got = Logits(r);
      double squares = 0, errors = 0, worst = 0;
      for (size_t i = 0; i < got.size(); ++i) {
        squares += want[r][i] * want[r][i];
        errors += (got[i] - want[r][i]) * (got[i] - want[r][i]);
        worst = std::max(worst, std::abs(got[i] - want[r][i]));
      }
      const double spread = std::sqrt(squares / got.size());
      EXPECT_GT(spread, 0.1);
      EXPECT_LT(std::sqrt(errors / got.size()) / spread, bound)
          << "rank " << r << " position " << position << " worst " << worst;
      for (int l = 0; l < s_.layers; ++l)
        EXPECT_LT(ranks_[r].LargestCacheError(l), sizeof(KV) == 1 ? 0.15 : 0.08) << "layer " << l;
      EXPECT_TRUE(ranks_[r].GuardsIntact());
    }
  }

  const Shape s_;
  std::mt19937 random_;
  std::vector<Rank<W, T, KV>> ranks_;
  std::vector<std::vector<T>> norms_;
  std::vector<std::unique_ptr<Memory>> norm_memory_;
  std::vector<float2> rotary_;
  std::unique_ptr<Memory> rotary_memory_, residual_, rows_;
  std::vector<cudaStream_t> streams_;
  std::vector<GemvExchange> exchanges_;
  std::vector<std::vector<StackLayer>> layers_;
  std::vector<RowStackArgs> args_;
};

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_TESTS_KERNELS_ROW_STACK_RIG_CUH_
