#include "worker/backend/cuda/step_graphs.h"

#include <algorithm>

#include "worker/backend/cuda/cuda_memory.h"

namespace lockstep::cuda {
namespace {

constexpr int kFirstContext = 2'048;
constexpr int kUsualContext = 8'192;

// 1, 2, 3, 4, 8, 12, 16, then steps of an eighth: a padded row costs little, a
// capture some milliseconds.
int BucketOf(int rows) {
  if (rows <= 4) return rows;
  if (rows <= 16) return (rows + 3) / 4 * 4;
  const int step = rows <= 64 ? 8 : rows <= 128 ? 16 : 32;
  return (rows + step - 1) / step * step;
}

// From little to everything.
constexpr kernels::SampleNeeds kKinds[] = {
    {},
    {.draw = true, .min_p = true},
    {.draw = true, .cut = true},
    {.draw = true, .cut = true, .nested = true},
    {.adjust = true, .draw = true, .cut = true, .nested = true, .min_p = true},
    {.adjust = true, .draw = true, .cut = true, .nested = true, .score = true, .min_p = true},
};

// Of those, the ones that usual requests need: greedy, by temperature, by top-p or top-k too.
constexpr int kUsualKinds = 3;

bool Covers(const kernels::SampleNeeds& kind, const kernels::SampleNeeds& needs) {
  return (kind.adjust || !needs.adjust) && (kind.draw || !needs.draw) && (kind.cut || !needs.cut) &&
         (kind.nested || !needs.nested) && (kind.score || !needs.score) &&
         (kind.min_p || !needs.min_p);
}

}  // namespace

StepGraphs::Key StepGraphs::KeyFor(int rows, int max_context,
                                   const kernels::SampleNeeds& needs) const {
  Key key;
  key.rows = std::min(BucketOf(rows), max_rows_);
  key.max_context = kFirstContext;
  while (key.max_context < max_context) key.max_context *= 4;
  key.max_context = std::min(key.max_context, max_context_);
  while (!Covers(kKinds[key.sampling], needs)) ++key.sampling;
  key.needs = kKinds[key.sampling];
  return key;
}

std::vector<StepGraphs::Key> StepGraphs::Usual() const {
  std::vector<Key> keys;
  for (int rows = 1; rows <= max_rows_; rows = BucketOf(rows) + 1) {
    for (int context = std::min(kFirstContext, max_context_);;) {
      for (int kind = 0; kind < kUsualKinds; ++kind)
        keys.push_back(KeyFor(rows, context, kKinds[kind]));
      if (context >= std::min(kUsualContext, max_context_)) break;
      context = std::min({4 * context, kUsualContext, max_context_});
    }
  }
  return keys;
}

const StepGraphs::Graph* StepGraphs::Find(const Key& key) const {
  const auto found = graphs_.find(key);
  return found == graphs_.end() ? nullptr : &found->second;
}

absl::StatusOr<const StepGraphs::Graph*> StepGraphs::EndCapture(
    cudaStream_t stream, const Key& key, const CollectiveStats& collectives) {
  cudaGraph_t graph = nullptr;
  cudaError_t error = cudaStreamEndCapture(stream, &graph);
  if (error != cudaSuccess) return ToStatus(error, "capturing a step");
  Graph captured;
  captured.collectives = collectives;
  error = cudaGraphInstantiate(&captured.exec, graph, 0);
  (void)cudaGraphDestroy(graph);
  if (error == cudaSuccess) error = cudaGraphUpload(captured.exec, stream);
  if (error != cudaSuccess) return ToStatus(error, "instantiating a captured step");
  return &graphs_.emplace(key, captured).first->second;
}

void StepGraphs::Clear() {
  for (const auto& [key, graph] : graphs_) (void)cudaGraphExecDestroy(graph.exec);
  graphs_.clear();
}

}  // namespace lockstep::cuda
