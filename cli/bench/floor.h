// The least a step, a prefill or a run can take on given hardware: the bytes
// that must be read over the bandwidth, or the products over the arithmetic
// rate, whichever is asked. Communication, launches and sampling count as
// nothing, so that the ratio to a measurement says what is left to win.
#ifndef LOCKSTEP_CLI_BENCH_FLOOR_H_
#define LOCKSTEP_CLI_BENCH_FLOOR_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "model/model_config.h"

namespace lockstep {

struct Hardware {
  double bytes_per_s = 0;  // of memory, a rank
  double flops_per_s = 0;  // of dense products, a rank; 0: unknown
  // Of products with quantized matrices; 0: as the others. Attention and head are
  // never among them.
  double quantized_flops_per_s = 0;
};

// How a server that was started with `serve_flags` behind `flag` (empty: not
// given) holds the layers' matrices, "" or "fp8": the last --quantization wins,
// and without one the checkpoint's.
std::string Quantization(const ModelConfig& config, const std::string& flag,
                         const std::vector<std::string>& serve_flags);

class Floor {
 public:
  // quantization: "" or "fp8"; kv_dtype: of keys and values. InvalidArgument when
  // tp_size cannot work.
  static absl::StatusOr<Floor> Make(const ModelConfig& config, DType dtype, DType kv_dtype,
                                    const std::string& quantization, int64_t tp_size,
                                    const Hardware& hardware);

  // Bytes the busiest rank reads in a decode step: its matrices, but for an
  // embedding of which a step reads only some rows, and the keys and values of
  // `batch` sequences of `context` tokens.
  int64_t DecodeBytes(double batch, double context) const;
  double DecodeSeconds(double batch, double context) const;

  // Seconds of arithmetic for `count` prompts of `tokens` each, or of reading
  // the weights once, whichever is longer. Without an arithmetic rate: the latter.
  double PrefillSeconds(double count, double tokens) const;

  // Output tokens a second when `count` requests come at once and `at_once` run.
  double ThroughputTokensPerSecond(double count, double at_once, double prompt,
                                   double output) const;

  int64_t weight_bytes() const { return weight_bytes_; }  // read a step by a rank

 private:
  Hardware hardware_;
  int64_t weight_bytes_ = 0;
  double kv_bytes_full_ = 0, kv_bytes_sliding_ = 0;  // a token, over layers of that kind
  double sliding_window_ = 0;
  double layer_weights_ = 0;  // elements a token is multiplied with
  double layer_flops_per_s_ = 0;
  double head_weights_ = 0;
  double pair_flops_full_ = 0, pair_flops_sliding_ = 0;  // a pair of positions
};

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_BENCH_FLOOR_H_
