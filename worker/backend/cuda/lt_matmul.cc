#include "worker/backend/cuda/lt_matmul.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "worker/backend/cuda/cuda_memory.h"

namespace lockstep::cuda {
namespace {

using kernels::Type;

// By measurement: the library's first proposal is mostly the fastest, or nearly so, but for some
// numbers of rows much slower than its second to fourth (8B, gate-up of 448 rows: 265 us, 149).
constexpr int kMaxProposals = 4;
constexpr int kMinTimedRows = 33;
// Below what noise may decide, so that the same machine comes to the same choice each time.
constexpr float kWorthChanging = 0.97f;

// The few entries that are used, by name.
struct Library {
// NOLINTBEGIN(bugprone-macro-parentheses): a name that is declared takes none.
#define LOCKSTEP_CUBLASLT(name) decltype(&::name) name = nullptr;
// NOLINTEND(bugprone-macro-parentheses)
#define LOCKSTEP_CUBLASLT_ENTRIES                     \
  LOCKSTEP_CUBLASLT(cublasLtCreate)                   \
  LOCKSTEP_CUBLASLT(cublasLtDestroy)                  \
  LOCKSTEP_CUBLASLT(cublasLtGetVersion)               \
  LOCKSTEP_CUBLASLT(cublasLtMatmul)                   \
  LOCKSTEP_CUBLASLT(cublasLtMatmulAlgoGetHeuristic)   \
  LOCKSTEP_CUBLASLT(cublasLtMatmulDescCreate)         \
  LOCKSTEP_CUBLASLT(cublasLtMatmulDescDestroy)        \
  LOCKSTEP_CUBLASLT(cublasLtMatmulDescSetAttribute)   \
  LOCKSTEP_CUBLASLT(cublasLtMatrixLayoutCreate)       \
  LOCKSTEP_CUBLASLT(cublasLtMatrixLayoutDestroy)      \
  LOCKSTEP_CUBLASLT(cublasLtMatrixLayoutSetAttribute) \
  LOCKSTEP_CUBLASLT(cublasLtMatmulPreferenceCreate)   \
  LOCKSTEP_CUBLASLT(cublasLtMatmulPreferenceDestroy)  \
  LOCKSTEP_CUBLASLT(cublasLtMatmulPreferenceSetAttribute)
  LOCKSTEP_CUBLASLT_ENTRIES
#undef LOCKSTEP_CUBLASLT

  absl::Status Open() {
    void* library = dlopen("libcublasLt.so.13", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      return absl::NotFoundError(
          absl::StrCat("--backend cuda needs libcublasLt.so.13 (cuBLAS of "
                       "CUDA 13): ",
                       dlerror()));
    }
// NOLINTBEGIN(bugprone-macro-parentheses): a name that is declared takes none.
#define LOCKSTEP_CUBLASLT(name)                                   \
  name = reinterpret_cast<decltype(name)>(dlsym(library, #name)); \
  if (name == nullptr) return absl::NotFoundError("libcublasLt.so.13 has no " #name);
    // NOLINTEND(bugprone-macro-parentheses)
    LOCKSTEP_CUBLASLT_ENTRIES
#undef LOCKSTEP_CUBLASLT
    return absl::OkStatus();
  }
};

cudaDataType_t DataType(Type type) {
  switch (type) {
    case Type::kF32:
      return CUDA_R_32F;
    case Type::kF16:
      return CUDA_R_16F;
    case Type::kBF16:
      return CUDA_R_16BF;
    case Type::kE4M3:
      return CUDA_R_8F_E4M3;
  }
  return CUDA_R_32F;
}

absl::Status Check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("cuBLASLt ", what, ": status ", static_cast<int>(status)));
}

// The shape that decides the algorithm.
using Key = std::tuple<int, int, int, Type, Type, int64_t, int64_t, int, bool, bool>;

// Parts begin at multiples of 16 bytes too, and scales are met once.
bool MayBeInParts(const MatmulArgs& args) {
  const int64_t part_bytes = args.k / kernels::kProductParts * TypeBytes(args.type);
  return args.parts != nullptr && args.x_scales == nullptr &&
         args.k % kernels::kProductParts == 0 && part_bytes % 16 == 0;
}

}  // namespace

struct LtMatmul::Impl {
  struct Plan {
    cublasLtMatmulDesc_t product = nullptr;
    cublasLtMatrixLayout_t weights = nullptr, x = nullptr, out = nullptr;
    cublasLtMatmulAlgo_t algorithm = {};
    bool in_parts = false;
    float ms = 0.0f;  // if it was timed
  };
  using Proposals = absl::Span<const cublasLtMatmulHeuristicResult_t>;

  absl::StatusOr<const Plan*> PlanFor(const MatmulArgs& args);
  // By the library's first proposal, or if timed by another that is a good deal faster with these
  // arguments.
  absl::Status MakePlan(const MatmulArgs& args, bool timed, Plan* plan);
  absl::Status Describe(const MatmulArgs& args, Plan* plan);
  void Destroy(const Plan& plan);
  absl::Status Launch(cudaStream_t stream, const MatmulArgs& args, const Plan& plan);
  absl::Status TakeFastest(const MatmulArgs& args, Proposals from, Plan* plan);
  // Milliseconds from device memory, the better of two runs.
  absl::StatusOr<float> Time(const MatmulArgs& args, const Plan& plan);

  Library lt;
  cublasLtHandle_t handle = nullptr;
  Buffer<std::byte> workspace;
  absl::flat_hash_map<Key, Plan> plans;
  bool timing = false;
  cudaStream_t timing_stream = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
};

// cuBLASLt counts by columns: out^T [n x m] = weights [k x n, transposed] . x [k x m].
absl::Status LtMatmul::Impl::Describe(const MatmulArgs& args, Plan* plan) {
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const auto& value) {
    return lt.cublasLtMatmulDescSetAttribute(plan->product, attribute, &value, sizeof(value));
  };
  cublasStatus_t status =
      lt.cublasLtMatmulDescCreate(&plan->product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  const cublasOperation_t transposed = CUBLAS_OP_T, plain = CUBLAS_OP_N;
  if (status == 0) status = set(CUBLASLT_MATMUL_DESC_TRANSA, transposed);
  if (status == 0) status = set(CUBLASLT_MATMUL_DESC_TRANSB, plain);
  if (status == 0 && args.multiprocessors > 0) {
    status = set(CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, int32_t{args.multiprocessors});
  }
  if (args.type == Type::kE4M3) {
    // The tensor cores' own accumulators all the way, as other servers do too: e4m3's
    // rounding is far coarser than theirs.
    const int8_t fast = 1;
    if (status == 0) status = set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, fast);
  }
  if (args.x_scales != nullptr) {
    const cublasLtMatmulMatrixScale_t per_row = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    if (status == 0) status = set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, per_row);
    if (status == 0) status = set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, per_row);
    if (status == 0) status = set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, args.weight_scales);
    if (status == 0) status = set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, args.x_scales);
  }
  const int parts = plan->in_parts ? kernels::kProductParts : 1;
  const uint64_t m = static_cast<uint64_t>(args.m), n = static_cast<uint64_t>(args.n),
                 k = static_cast<uint64_t>(args.k / parts);
  // Each part of a matrix begins so many elements behind the one before.
  const auto create = [&](cublasLtMatrixLayout_t* layout, Type type, uint64_t rows,
                          uint64_t columns, int64_t stride, int64_t part) {
    if (status == 0)
      status = lt.cublasLtMatrixLayoutCreate(layout, DataType(type), rows, columns, stride);
    if (status == 0 && parts > 1)
      status = lt.cublasLtMatrixLayoutSetAttribute(*layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                                                   &parts, sizeof(parts));
    if (status == 0 && parts > 1)
      status = lt.cublasLtMatrixLayoutSetAttribute(
          *layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &part, sizeof(part));
  };
  create(&plan->weights, args.type, k, n, args.k, args.k / parts);
  create(&plan->x, args.type, k, m, args.x_stride, args.k / parts);
  create(&plan->out, plan->in_parts ? Type::kF32 : args.out_type, n, m,
         plan->in_parts ? args.n : args.out_stride, int64_t{args.m} * args.n);
  return Check(status, "describing a product");
}

absl::StatusOr<const LtMatmul::Impl::Plan*> LtMatmul::Impl::PlanFor(const MatmulArgs& args) {
  const Key key(args.m, args.n, args.k, args.type, args.out_type, args.x_stride, args.out_stride,
                args.multiprocessors, args.x_scales != nullptr, args.parts != nullptr);
  const auto found = plans.find(key);
  if (found != plans.end()) return &found->second;
  const bool timed = timing && args.type != Type::kF32 && args.m >= kMinTimedRows;
  Plan plan;
  if (absl::Status status = MakePlan(args, timed, &plan); !status.ok()) return status;
  if (timed && MayBeInParts(args)) {
    Plan other;
    other.in_parts = true;
    if (MakePlan(args, timed, &other).ok() && other.ms < plan.ms * kWorthChanging)
      std::swap(plan, other);
    Destroy(other);
  }
  return &plans.emplace(key, plan).first->second;
}

absl::Status LtMatmul::Impl::MakePlan(const MatmulArgs& args, bool timed, Plan* plan) {
  if (absl::Status status = Describe(args, plan); !status.ok()) return status;
  cublasLtMatmulPreference_t preference = nullptr;
  cublasStatus_t status = lt.cublasLtMatmulPreferenceCreate(&preference);
  const size_t bytes = kWorkspaceBytes;
  if (status == 0)
    status = lt.cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes));
  cublasLtMatmulHeuristicResult_t proposals[kMaxProposals] = {};
  int found_algorithms = 0;
  if (status == 0)
    status = lt.cublasLtMatmulAlgoGetHeuristic(
        handle, plan->product, plan->weights, plan->x, plan->out, plan->out, preference,
        timed ? kMaxProposals : 1, proposals, &found_algorithms);
  lt.cublasLtMatmulPreferenceDestroy(preference);
  if (status != 0 || found_algorithms == 0) {
    return absl::InternalError(absl::StrCat("cuBLASLt has no algorithm for a product of ", args.m,
                                            " x ", args.n, " x ", args.k, " (status ",
                                            static_cast<int>(status), ")"));
  }
  plan->algorithm = proposals[0].algo;
  if (!timed) return absl::OkStatus();
  return TakeFastest(args, {proposals, static_cast<size_t>(found_algorithms)}, plan);
}

absl::Status LtMatmul::Impl::TakeFastest(const MatmulArgs& args, Proposals from, Plan* plan) {
  // A capture may be under way on this thread, on another stream.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  absl::Status status = ToStatus(cudaThreadExchangeStreamCaptureMode(&mode), "timing a product");
  if (!status.ok()) return status;
  std::optional<cublasLtMatmulAlgo_t> best;
  for (const cublasLtMatmulHeuristicResult_t& proposal : from) {
    plan->algorithm = proposal.algo;
    const absl::StatusOr<float> ms = Time(args, *plan);
    status.Update(ms.status());  // one that does not run is passed over
    if (!ms.ok() || (best.has_value() && *ms >= plan->ms * kWorthChanging)) continue;
    plan->ms = *ms;
    best = plan->algorithm;
  }
  absl::Status restored = ToStatus(cudaThreadExchangeStreamCaptureMode(&mode), "timing a product");
  if (!best.has_value()) return status;
  plan->algorithm = *best;
  return restored;
}

absl::StatusOr<float> LtMatmul::Impl::Time(const MatmulArgs& args, const Plan& plan) {
  absl::Status status = absl::OkStatus();
  const auto check = [&](cudaError_t error) {
    if (status.ok()) status = ToStatus(error, "timing a product");
  };
  if (timing_stream == nullptr) {
    check(cudaStreamCreateWithFlags(&timing_stream, cudaStreamNonBlocking));
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
  }
  if (status.ok()) status = Launch(timing_stream, args, plan);  // loads the kernel
  float least = 0.0f;
  for (int i = 0; i < 2 && status.ok(); ++i) {
    // What is larger than the L2 leaves nothing else in it.
    check(cudaMemsetAsync(workspace.get(), 0, kWorkspaceBytes, timing_stream));
    check(cudaEventRecord(begin, timing_stream));
    if (status.ok()) status = Launch(timing_stream, args, plan);
    check(cudaEventRecord(end, timing_stream));
    check(cudaEventSynchronize(end));
    float ms = 0.0f;
    check(cudaEventElapsedTime(&ms, begin, end));
    least = i == 0 ? ms : std::min(least, ms);
  }
  if (!status.ok()) return status;
  return least;
}

void LtMatmul::Impl::Destroy(const Plan& plan) {
  if (plan.product != nullptr) lt.cublasLtMatmulDescDestroy(plan.product);
  for (cublasLtMatrixLayout_t layout : {plan.weights, plan.x, plan.out}) {
    if (layout != nullptr) lt.cublasLtMatrixLayoutDestroy(layout);
  }
}

LtMatmul::LtMatmul(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

LtMatmul::~LtMatmul() {
  for (const auto& [key, plan] : impl_->plans) impl_->Destroy(plan);
  if (impl_->timing_stream != nullptr) (void)cudaStreamDestroy(impl_->timing_stream);
  for (cudaEvent_t event : {impl_->begin, impl_->end}) {
    if (event != nullptr) (void)cudaEventDestroy(event);
  }
  if (impl_->handle != nullptr) impl_->lt.cublasLtDestroy(impl_->handle);
}

absl::StatusOr<std::unique_ptr<LtMatmul>> LtMatmul::Create() {
  auto impl = std::make_unique<Impl>();
  if (absl::Status status = impl->lt.Open(); !status.ok()) return status;
  absl::Status status = Check(impl->lt.cublasLtCreate(&impl->handle), "starting");
  if (status.ok()) status = impl->workspace.Allocate(kWorkspaceBytes, "cuBLASLt's workspace");
  if (!status.ok()) return status;
  return std::unique_ptr<LtMatmul>(new LtMatmul(std::move(impl)));
}

absl::Status LtMatmul::Impl::Launch(cudaStream_t stream, const MatmulArgs& args, const Plan& plan) {
  if (args.x_scales != nullptr) {
    // The scales are the call's, the rest the shape's.
    const auto set = [&](cublasLtMatmulDescAttributes_t attribute, const float* value) {
      return lt.cublasLtMatmulDescSetAttribute(plan.product, attribute, &value, sizeof(value));
    };
    cublasStatus_t status = set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, args.weight_scales);
    if (status == 0) status = set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, args.x_scales);
    if (status != 0) return Check(status, "scales of a product");
  }
  const float one = 1.0f, zero = 0.0f;
  void* const out = plan.in_parts ? args.parts : args.out;
  return Check(lt.cublasLtMatmul(handle, plan.product, &one, args.weights, plan.weights, args.x,
                                 plan.x, &zero, out, plan.out, out, plan.out, &plan.algorithm,
                                 workspace.get(), kWorkspaceBytes, stream),
               "a product");
}

absl::StatusOr<bool> LtMatmul::Run(cudaStream_t stream, const MatmulArgs& args) {
  const absl::StatusOr<const Impl::Plan*> plan = impl_->PlanFor(args);
  if (!plan.ok()) return plan.status();
  if (absl::Status status = impl_->Launch(stream, args, **plan); !status.ok()) return status;
  return (*plan)->in_parts;
}

void LtMatmul::TimeNewShapes(bool on) { impl_->timing = on; }

std::string LtMatmul::version() const {
  const size_t v = impl_->lt.cublasLtGetVersion();
  return absl::StrCat("cuBLASLt ", v / 10000, ".", v / 100 % 100, ".", v % 100);
}

}  // namespace lockstep::cuda
