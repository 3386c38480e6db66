// A paged cache of some sequences, rows over it, and their attention computed on
// the host in double precision. Every cached value that no row sees is a NaN, so
// one look too far shows in the result.
#ifndef LOCKSTEP_TESTS_KERNELS_ATTENTION_CASE_H_
#define LOCKSTEP_TESTS_KERNELS_ATTENTION_CASE_H_

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/types.h"
#include "tests/kernels/device_rows.h"

namespace lockstep::kernels {

struct AttentionShape {
  int heads = 8, kv_heads = 2, head_dim = 64, block_size = 16;
  int window = 0;
  float sharpness = 2.0f;                // scale = sharpness / sqrt(head_dim)
  float k_scale = 1.0f, v_scale = 1.0f;  // e4m3
};

// A row of a step: slot -1 is padding.
struct AttentionRow {
  int slot = 0;
  int position = 0;
};

inline std::string Describe(const AttentionShape& s) {
  return "heads " + std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " dim " +
         std::to_string(s.head_dim) + " block " + std::to_string(s.block_size) + " window " +
         std::to_string(s.window);
}

template <typename T, typename KV>
class AttentionCase {
 public:
  AttentionCase(const AttentionShape& shape, const std::vector<AttentionRow>& rows, uint32_t seed)
      : shape_(shape), rows_(rows), generator_(seed) {
    int slots = 1;
    for (const AttentionRow& row : rows_) slots = std::max(slots, row.slot + 1);
    lengths_.assign(slots, 0);
    firsts_.assign(slots, 1 << 30);
    for (const AttentionRow& row : rows_) {
      if (row.slot < 0) continue;
      const int first = shape.window > 0 ? std::max(0, row.position + 1 - shape.window) : 0;
      lengths_[row.slot] = std::max(lengths_[row.slot], row.position + 1);
      firsts_[row.slot] = std::min(firsts_[row.slot], first);
    }
    MakeTables();
    MakeCache();
    q_stride_ = (shape.heads + 2 * shape.kv_heads) * shape.head_dim + 16;
    out_stride_ = shape.heads * shape.head_dim + 8;
    q_ = RandomRows(static_cast<int64_t>(rows_.size()) * q_stride_);
  }

  const AttentionShape& shape() const { return shape_; }
  int num_rows() const { return static_cast<int>(rows_.size()); }
  int q_stride() const { return q_stride_; }
  int out_stride() const { return out_stride_; }
  int table_stride() const { return table_stride_; }
  float scale() const { return shape_.sharpness / std::sqrt(static_cast<float>(shape_.head_dim)); }
  std::vector<float>& q() { return q_; }
  std::vector<KV>& k() { return k_; }
  std::vector<KV>& v() { return v_; }
  const std::vector<int32_t>& tables() const { return tables_; }
  std::vector<int32_t> slots() const {
    std::vector<int32_t> all;
    for (const AttentionRow& row : rows_) all.push_back(row.slot);
    return all;
  }
  std::vector<int32_t> positions() const {
    std::vector<int32_t> all;
    for (const AttentionRow& row : rows_) all.push_back(row.position);
    return all;
  }
  int max_context() const { return *std::max_element(lengths_.begin(), lengths_.end()); }

  // Of an element 0 in the cache.
  int64_t CacheOffset(int slot, int kv_head, int position) const {
    const int64_t block = tables_[slot * table_stride_ + position / shape_.block_size];
    return ((block * shape_.kv_heads + kv_head) * shape_.block_size +
            position % shape_.block_size) *
           shape_.head_dim;
  }

  // [heads, head_dim] of row r.
  std::vector<double> Expected(int r) const {
    const AttentionRow& row = rows_[r];
    const int dim = shape_.head_dim, group = shape_.heads / shape_.kv_heads;
    const int end = row.position + 1;
    const int begin = shape_.window > 0 ? std::max(0, end - shape_.window) : 0;
    const bool narrow = sizeof(KV) == 1;
    std::vector<double> out(static_cast<size_t>(shape_.heads) * dim, 0.0);
    std::vector<double> score(end);
    std::vector<float> value(dim);
    for (int head = 0; head < shape_.heads; ++head) {
      const float* q = &q_[static_cast<int64_t>(r) * q_stride_ + head * dim];
      double top = -INFINITY, sum = 0.0;
      for (int p = begin; p < end; ++p) {
        const KV* k = &k_[CacheOffset(row.slot, head / group, p)];
        double dot = 0.0;
        for (int d = 0; d < dim; ++d) dot += static_cast<double>(q[d]) * HostFloat(k[d]);
        score[p] = dot * scale() * (narrow ? shape_.k_scale : 1.0f);
        top = std::max(top, score[p]);
      }
      double* at = &out[static_cast<size_t>(head) * dim];
      for (int p = begin; p < end; ++p) {
        const double weight = std::exp(score[p] - top);
        sum += weight;
        const KV* v = &v_[CacheOffset(row.slot, head / group, p)];
        for (int d = 0; d < dim; ++d) at[d] += weight * HostFloat(v[d]);
      }
      for (int d = 0; d < dim; ++d) at[d] *= (narrow ? shape_.v_scale : 1.0f) / sum;
    }
    return out;
  }

  // Compares each head of each row by the norm of its error; padding rows and
  // what lies beside the heads must be as before.
  void Check(const DeviceRows<T>& out, double tolerance, const std::string& what) const {
    out.ExpectGuards(what);
    const std::vector<T> bits = out.Bits();
    const int width = shape_.heads * shape_.head_dim;
    for (int r = 0; r < num_rows(); ++r) {
      const T* row = &bits[static_cast<size_t>(r) * out_stride_];
      const bool padding = rows_[r].slot < 0;
      for (int i = padding ? 0 : width; i < out_stride_; ++i) {
        ASSERT_TRUE(DeviceRows<T>::Untouched(row[i])) << what << " row " << r << " element " << i;
      }
      if (padding) continue;
      const std::vector<double> expected = Expected(r);
      for (int head = 0; head < shape_.heads; ++head) {
        double error = 0.0, norm = 1e-30;
        for (int i = head * shape_.head_dim; i < (head + 1) * shape_.head_dim; ++i) {
          const double difference = static_cast<double>(HostFloat(row[i])) - expected[i];
          error += difference * difference;
          norm += expected[i] * expected[i];
        }
        const double relative = std::sqrt(error / norm);
        ASSERT_TRUE(relative <= tolerance)  // false for NaN as well
            << what << " row " << r << " position " << rows_[r].position << " head " << head
            << ": relative error " << relative << " above " << tolerance;
      }
    }
  }

 private:
  std::vector<float> RandomRows(int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& v : values) v = HostRounded<T>(normal(generator_));
    return values;
  }

  // Blocks in random order, some between them unused.
  void MakeTables() {
    table_stride_ = 1;
    for (const int length : lengths_) {
      table_stride_ = std::max(table_stride_, (length + shape_.block_size - 1) / shape_.block_size);
    }
    table_stride_ += 3;
    const int slots = static_cast<int>(lengths_.size());
    std::vector<int32_t> ids(static_cast<size_t>(slots) * table_stride_ + 2);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), generator_);
    num_blocks_ = static_cast<int>(ids.size());
    tables_.assign(ids.begin(), ids.begin() + static_cast<int64_t>(slots) * table_stride_);
  }

  void MakeCache() {
    const int64_t count =
        static_cast<int64_t>(num_blocks_) * shape_.kv_heads * shape_.block_size * shape_.head_dim;
    KV nan;
    memset(static_cast<void*>(&nan), 0xff, sizeof(nan));
    k_.assign(count, nan);
    v_.assign(count, nan);
    std::normal_distribution<float> normal;
    for (size_t slot = 0; slot < lengths_.size(); ++slot) {
      for (int p = firsts_[slot]; p < lengths_[slot]; ++p) {
        for (int head = 0; head < shape_.kv_heads; ++head) {
          const int64_t at = CacheOffset(static_cast<int>(slot), head, p);
          for (int d = 0; d < shape_.head_dim; ++d) {
            k_[at + d] = HostElement<KV>(normal(generator_));
            v_[at + d] = HostElement<KV>(normal(generator_));
          }
        }
      }
    }
  }

  const AttentionShape shape_;
  const std::vector<AttentionRow> rows_;
  std::mt19937 generator_;
  std::vector<int> lengths_, firsts_;
  int num_blocks_ = 0, table_stride_ = 0, q_stride_ = 0, out_stride_ = 0;
  std::vector<int32_t> tables_;
  std::vector<float> q_;
  std::vector<KV> k_, v_;
};

// What a device copy of a case needs besides q and out.
template <typename KV>
struct DeviceCache {
  template <typename T>
  explicit DeviceCache(AttentionCase<T, KV>& c)
      : k(static_cast<int64_t>(c.k().size())),
        v(static_cast<int64_t>(c.v().size())),
        tables(static_cast<int64_t>(c.tables().size())),
        slots(c.num_rows()),
        positions(c.num_rows()) {
    k.PutBits(c.k());
    v.PutBits(c.v());
    tables.PutBits(c.tables());
    slots.PutBits(c.slots());
    positions.PutBits(c.positions());
    const AttentionShape& s = c.shape();
    layer = {k.get(),      v.get(),    TypeOf<KV>(), s.kv_heads,
             s.block_size, s.head_dim, s.k_scale,    s.v_scale};
    rows = {slots.get(), positions.get(), tables.get(), c.table_stride()};
  }

  DeviceRows<KV> k, v;
  DeviceRows<int32_t> tables, slots, positions;
  KvLayer layer;
  StepRows rows;
};

// By the norm of a head's error. Rounding the probabilities costs about a unit in
// the last place of T; leaving out one of a thousand positions, several hundredths.
template <typename T>
constexpr double AttentionTolerance() {
  if (std::is_same_v<T, float>) return 2e-6;
  return std::is_same_v<T, __half> ? 1.5e-3 : 1e-2;
}

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_TESTS_KERNELS_ATTENTION_CASE_H_
