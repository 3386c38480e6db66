// Which kernels a matrix product goes by: for one row and for few, those of gemv.h and
// skinny_cluster.h; for more, cuBLASLt.
#include "kernels/quantize.h"
#include "kernels/skinny_cluster.h"
#include "worker/backend/cuda/backend_impl.h"

namespace lockstep::cuda {
namespace {

using kernels::GemvArgs;
using kernels::GemvEpilogue;
using kernels::Type;

// Several rows of more than this leave the skinny kernel's ring too short, and
// cuBLASLt streams faster (K 14,336 at 16 rows: 3.4 against 2.0 TB/s).
constexpr int64_t kMaxSkinnyK = 8'192;
// By measurement: where cuBLASLt multiplies e4m3 and need not apply a scale a row and a column, it
// has its pick of kernels; else there is one, of tiles of 128 rows of either (down of an 8B, 256
// rows: 28 and 46 us; 70B, 192 rows: gate-up 145 and 220). For long ones the one is as good.
constexpr int kMaxUnscaledRows = 2'048;

}  // namespace

bool CudaBackend::TakesCluster(const Linear& linear, int m) const {
  const DeviceTensor& w = linear.weight;
  // By measurement: above 32 rows cuBLASLt is as fast with 16 bits, and with e4m3 where it may
  // leave the scales (8B, FP8 KV, 64 rows: 4.88 and 4.71 ms a step).
  const bool column_parallel = w.cols == hidden_ && w.rows != hidden_;
  const bool unscaled = type_ == Type::kBF16 && (collectives_.size() == 1 || column_parallel);
  const bool faster = m <= 32 || (w.type == Type::kE4M3 && !unscaled);
  if (m < 2 || !faster || type_ == Type::kF32) return false;
  return kernels::SkinnyClusterSupports(
      ClusterArgs(linear, m, Quantized(linear) ? buffers_.quantized_scales.get() : nullptr));
}

bool CudaBackend::QuantizesAsStaged(const Linear& linear, int m) const {
  return Quantized(linear) && TakesCluster(linear, m) &&
         kernels::SkinnyClusterSupports(ClusterArgs(linear, m, nullptr));
}

kernels::SkinnyClusterArgs CudaBackend::ClusterArgs(const Linear& linear, int m,
                                                    const float* x_scales) const {
  const DeviceTensor& w = linear.weight;
  return {.weights = w.data,
          .type = w.type,
          .n = static_cast<int>(w.rows),
          .k = static_cast<int>(w.cols),
          .m = m,
          .x = buffers_.heads.get(),
          .weight_scales = w.scales,
          .x_scales = x_scales,
          .out_type = type_};
}

kernels::QuantizedRows CudaBackend::TakesQuantized(const void* made, const Linear& next) {
  if (!Quantized(next)) return {};
  if (part_.rows <= kMaxSkinnyRows && !TakesCluster(next, part_.rows)) return {};
  quantized_from_ = made;
  quantized_ = {.values = buffers_.quantized.get(), .scales = buffers_.quantized_scales.get()};
  return quantized_;
}

bool CudaBackend::Gemv(const void* x, int64_t x_stride, const Linear& linear, int m, void* out,
                       int64_t out_stride, GemvEpilogue epilogue) {
  const DeviceTensor& w = linear.weight;
  GemvArgs args = {.weights = w.data,
                   .weight_type = w.type,
                   .scales = w.scales,
                   .n = static_cast<int>(w.rows),
                   .k = static_cast<int>(w.cols),
                   .type = type_,
                   .m = m,
                   .x = x,
                   .x_stride = x_stride,
                   .epilogue = epilogue,
                   .out = out,
                   .out_stride = out_stride};
  TakeReduce(&args);
  if (m > kMaxSkinnyRows || (m > 1 && w.cols > kMaxSkinnyK)) return false;
  // It need not be there but as e4m3.
  if (Quantized(linear) && x == quantized_from_) return false;
  if (TakesCluster(linear, m) || !kernels::GemvSupports(args)) return false;
  Check(kernels::Gemv(launch(), args), "a product of few rows");
  return true;
}

void CudaBackend::Matmul(const void* x, int64_t x_stride, const Linear& linear, int m, void* out,
                         int64_t out_stride, GemvEpilogue epilogue, LeftToReader* left) {
  if (left != nullptr) {
    left->scales = {};
    left->parts = nullptr;
  }
  if (Gemv(x, x_stride, linear, m, out, out_stride, epilogue)) return;
  const DeviceTensor& w = linear.weight;
  MatmulArgs args = {.m = m,
                     .n = static_cast<int>(w.rows),
                     .k = static_cast<int>(w.cols),
                     .type = w.type,
                     .out_type = epilogue == GemvEpilogue::kLogits ? Type::kF32 : type_,
                     .x = x,
                     .x_stride = x_stride,
                     .weights = w.data,
                     .out = out,
                     .out_stride = out_stride,
                     .x_scales = nullptr,
                     .weight_scales = w.scales,
                     .multiprocessors = halved_ ? ProductsMultiprocessors() : 0};
  if (Quantized(linear) && (x == quantized_from_ || !QuantizesAsStaged(linear, m))) {
    if (x != quantized_from_) {
      quantized_ = {.values = buffers_.quantized.get(), .scales = buffers_.quantized_scales.get()};
      Check(kernels::QuantizeRows(launch(), {.type = type_,
                                             .num_rows = m,
                                             .width = args.k,
                                             .slot = nullptr,
                                             .in = x,
                                             .in_stride = x_stride,
                                             .out = quantized_.values,
                                             .out_stride = args.k,
                                             .scales = quantized_.scales}),
            "quantising activations");
    }
    quantized_from_ = nullptr;  // one copy, for one product
    args.x = quantized_.values;
    args.x_stride = args.k;
    args.x_scales = quantized_.scales;
  }
  if (TakesCluster(linear, m)) {
    kernels::SkinnyClusterArgs few = ClusterArgs(linear, m, args.x_scales);
    few.x = args.x;
    few.x_stride = args.x_stride;
    few.epilogue = epilogue;
    if (epilogue == GemvEpilogue::kPush) few.push = push_;
    few.out = out;
    few.out_stride = out_stride;
    Check(kernels::SkinnyCluster(launch(), few), "a product of few rows");
    return;
  }
  // In fp16 sums without their scales would overflow.
  if (left != nullptr && Quantized(linear) && type_ == Type::kBF16 && m <= kMaxUnscaledRows) {
    left->scales = {.rows = args.x_scales, .columns = args.weight_scales};
    args.x_scales = args.weight_scales = nullptr;
  }
  if (left != nullptr) args.parts = left->room;
  if (!status_.ok()) return;
  const absl::StatusOr<bool> in_parts = lt_->Run(stream_, args);
  status_ = in_parts.status();
  if (in_parts.ok() && *in_parts) left->parts = args.parts;
}

// The ranks' sums are of what is scaled already, and whole.
void CudaBackend::MatmulPartial(const void* x, int width, const Linear& linear) {
  push_ = PushOfPartial(linear);
  // `up` holds something only from a layer's product into it to its activation's end.
  const size_t part_bytes = size_t(part_.rows) * hidden_ * sizeof(float);
  partial_left_.room = kernels::kProductParts * part_bytes <= buffers_.up.bytes()
                           ? reinterpret_cast<float*>(buffers_.up.get())
                           : nullptr;
  Matmul(x, width, linear, part_.rows, Rows(buffers_.partial, hidden_), hidden_,
         push_.size > 0 ? GemvEpilogue::kPush : GemvEpilogue::kStore,
         collectives_.size() == 1 ? &partial_left_ : nullptr);
}

kernels::ExchangePush CudaBackend::PushOfPartial(const Linear& linear) const {
  // What can fold has a residual and an RMS norm behind each sum.
  if (collectives_.size() == 1 || halved_ || !can_fold_ || part_.rows > kernels::kMaxPushedRows ||
      !TakesCluster(linear, part_.rows))
    return {};
  return collectives_.push_for({.type = type_,
                                .rows = part_.rows,
                                .hidden = hidden_,
                                .pushed = true,
                                .residual = buffers_.residual.get()});
}

}  // namespace lockstep::cuda
