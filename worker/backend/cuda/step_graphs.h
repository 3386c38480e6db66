// The captured decode steps of an epoch: one for each bucket of rows, bound of the
// context and kind of sampling. The usual ones are captured before the epoch's first step,
// others when they come up. They hold addresses of this epoch's peers, so they live as
// long as it does.
#ifndef LOCKSTEP_WORKER_BACKEND_CUDA_STEP_GRAPHS_H_
#define LOCKSTEP_WORKER_BACKEND_CUDA_STEP_GRAPHS_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "absl/container/node_hash_map.h"
#include "absl/status/statusor.h"
#include "kernels/sample.h"
#include "worker/comm/communicator.h"

namespace lockstep::cuda {

class StepGraphs {
 public:
  struct Key {
    int rows = 0;         // the bucket
    int max_context = 0;  // no row's position reaches it
    int sampling = 0;     // what `needs` is made from
    kernels::SampleNeeds needs;

    friend bool operator==(const Key& a, const Key& b) { return a.tied() == b.tied(); }
    template <typename H>
    friend H AbslHashValue(H h, const Key& key) {
      return H::combine(std::move(h), key.rows, key.max_context, key.sampling);
    }
    std::tuple<int, int, int> tied() const { return {rows, max_context, sampling}; }
  };
  struct Graph {
    cudaGraphExec_t exec = nullptr;
    CollectiveStats collectives;  // of one replay
  };

  StepGraphs() = default;
  ~StepGraphs() { Clear(); }
  StepGraphs(const StepGraphs&) = delete;
  StepGraphs& operator=(const StepGraphs&) = delete;

  // The steps are never larger than these.
  void SetLimits(int max_rows, int max_context) {
    max_rows_ = max_rows;
    max_context_ = max_context;
  }
  // Rounded up, so that few captures serve all steps.
  Key KeyFor(int rows, int max_context, const kernels::SampleNeeds& needs) const;
  // Those of every number of rows, contexts up to 8,192 and the usual ways of sampling.
  std::vector<Key> Usual() const;
  const Graph* Find(const Key& key) const;
  // Ends the capture on `stream` and keeps it.
  absl::StatusOr<const Graph*> EndCapture(cudaStream_t stream, const Key& key,
                                          const CollectiveStats& collectives);
  void Clear();

 private:
  int max_rows_ = 0, max_context_ = 0;
  absl::node_hash_map<Key, Graph> graphs_;
};

}  // namespace lockstep::cuda

#endif  // LOCKSTEP_WORKER_BACKEND_CUDA_STEP_GRAPHS_H_
