// A config.json of any family, quantised or not, and all that is made of it
// before a tensor is read: shards of every rank, bytes of memory. With a first
// byte of 'g', a generation_config.json.
#include <algorithm>
#include <string>

#include "common/check.h"
#include "model/memory_model.h"
#include "model/model_config.h"
#include "model/shard_plan.h"
#include "tests/fuzz/fuzz_input.h"

namespace lockstep::fuzz {
namespace {

// Every slice lies in its tensor, and as many rows as the shard has hold them.
void RequireShard(const ShardPlan& plan) {
  for (const LocalTensor& tensor : plan.tensors) {
    int64_t rows = 0;
    for (const TensorSlice& slice : tensor.slices) {
      LOCKSTEP_CHECK(0 <= slice.row_begin && slice.row_begin <= slice.row_end &&
                     slice.row_end <= slice.rows);
      LOCKSTEP_CHECK(0 <= slice.col_begin && slice.col_begin <= slice.col_end &&
                     slice.col_end <= slice.cols);
      rows += slice.row_end - slice.row_begin;
    }
    LOCKSTEP_CHECK(tensor.rows >= rows && tensor.rows > 0 && tensor.cols > 0);
  }
}

void Shards(const ModelConfig& config) {
  for (const int64_t tp : ValidTpSizes(config, 16)) {
    for (const int64_t rank : {int64_t{0}, tp - 1}) {
      const auto plan = MakeShardPlan(config, tp, rank);
      LOCKSTEP_CHECK(plan.ok());
      RequireShard(*plan);
      for (const BackendKind backend : {BackendKind::kCpu, BackendKind::kCuda}) {
        const auto memory = PredictRankMemory(config, {}, tp, rank, backend);
        if (!memory.ok()) {
          RequireRefusal(memory.status());
        } else {
          LOCKSTEP_CHECK(memory->weight_bytes > 0 && memory->kv_bytes_per_token > 0);
          LOCKSTEP_CHECK(memory->fixed_bytes() >= memory->weight_bytes);
        }
      }
    }
  }
  for (const int64_t tp : {3, 7, 1 << 20}) {
    if (const auto plan = MakeShardPlan(config, tp, 0); !plan.ok()) RequireRefusal(plan.status());
  }
}

void Config(std::string_view json) {
  const auto config = ParseModelConfig(json, "config.json");
  if (!config.ok()) return RequireRefusal(config.status());
  for (const BackendKind backend : {BackendKind::kCpu, BackendKind::kCuda}) {
    if (const absl::Status s = CheckServable(*config, backend); !s.ok()) RequireRefusal(s);
  }
  // A plan lists each tensor; what is allowed is deeper than is quick to try.
  if (config->num_layers <= 4) Shards(*config);
}

void Generation(std::string_view json) {
  static const ScratchDir dir;
  dir.Write("generation_config.json", json);
  const auto read = LoadGenerationConfig(dir.path());
  if (!read.ok()) RequireRefusal(read.status());
}

}  // namespace
}  // namespace lockstep::fuzz

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep::fuzz;
  Input input(data, size);
  if (size > 0 && data[0] == 'g') {
    input.Byte();
    Generation(input.Rest());
  } else {
    Config(input.Rest());
  }
  return 0;
}
