// What `lockstep plan` does once its flags are read: how a model would fit on
// GPUs of a given memory, at tensor parallel sizes 1, 2, 4 and 8. Needs no GPU,
// and of the model no more than its config.json; where weights lie beside it,
// their headers are checked against it.
#ifndef LOCKSTEP_CLI_PLAN_COMMAND_H_
#define LOCKSTEP_CLI_PLAN_COMMAND_H_

#include <cstdint>
#include <ostream>
#include <string>

namespace lockstep {

// Named like the flags. 0 and "auto" stand for the default that follows from
// the model or the backend.
struct PlanOptions {
  std::string model;                    // a directory, or a config.json
  std::string gpu_memory = "80GiB";     // of one rank
  std::string backend = "cuda";         // cuda, cpu
  std::string dtype = "auto";           // auto, float32, float16, bfloat16
  std::string quantization;             // "", fp8
  std::string kv_cache_dtype = "auto";  // auto, fp8
  int64_t max_model_len = 0;            // the smaller of 8192 and the model's
  int64_t max_num_seqs = 24;
  int64_t max_num_batched_tokens = 0;  // 8192 on cuda, 2048 on cpu, as `serve` has it
  int64_t block_size = 16;
  double gpu_memory_utilization = 0.9;
  bool json = false;
};

// Writes the report to `out` as a table or as JSON, and returns 0; or one line
// to `err`, and 1. That nothing fits is an answer, not a failure.
int RunPlan(const PlanOptions& options, std::ostream& out, std::ostream& err);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_PLAN_COMMAND_H_
