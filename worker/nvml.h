// What the driver says of one GPU, through NVML, which is opened at run time:
// sampled about once a second by a thread of its own, so that a driver that
// takes its time delays nobody. SM and memory activity come from NVML's GPM
// counters (Hopper and later); what the driver does not give is left out.
#ifndef LOCKSTEP_WORKER_NVML_H_
#define LOCKSTEP_WORKER_NVML_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "proto/worker.pb.h"

namespace lockstep {

struct NvmlOptions {
  std::string library = "libnvidia-ml.so.1";
  int64_t interval_ms = 1'000;
};

class NvmlSampler {
 public:
  // uuid: "GPU-…", as CUDA and NVML write it. NotFound: no library, or it does
  // not know the GPU.
  static absl::StatusOr<std::unique_ptr<NvmlSampler>> Start(const std::string& uuid,
                                                            const NvmlOptions& options = {});
  ~NvmlSampler();

  // Of the GPU's memory, as Start found it; 0: the driver does not tell.
  int64_t free_bytes_at_start() const;
  // The last sample, once: empty until there is a new one. Any thread.
  std::optional<worker::v1::DeviceStats> Take();

 private:
  struct Impl;
  explicit NvmlSampler(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_NVML_H_
