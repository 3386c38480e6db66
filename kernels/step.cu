#include <algorithm>

#include "kernels/device.cuh"
#include "kernels/step.h"

namespace lockstep::kernels {
namespace {

constexpr int kThreads = 256;

// Mapped memory must not be read through a cache that an earlier step filled.
template <typename T>
__device__ T ReadHost(const T* p) {
  return __ldcv(p);
}

__global__ void __launch_bounds__(kThreads)
    PrepareKernel(StepIo io, StepArrays arrays, int pad_rows, int pad_logit_rows) {
  TriggerDependents();
  WaitForPrevious();
  const int thread = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(gridDim.x) * kThreads;
  if (thread == 0) *io.begin_ns = DeviceClockNs();
  const uint64_t sequence = *io.sequence;
  const std::byte* entry = io.inbox + (sequence % kStepRing) * io.inbox_layout.bytes;
  const int4 counts = ReadHost(reinterpret_cast<const int4*>(entry));
  const auto* slot = reinterpret_cast<const int32_t*>(entry + io.inbox_layout.slot);
  const auto* position = reinterpret_cast<const int32_t*>(entry + io.inbox_layout.position);
  for (int i = thread; i < pad_rows; i += threads) {
    const bool live = i < counts.x;
    arrays.slot[i] = live ? ReadHost(slot + i) : -1;
    arrays.position[i] = live ? ReadHost(position + i) : 0;
  }
  const auto* logit = reinterpret_cast<const int4*>(entry + io.inbox_layout.logit_rows);
  for (int i = thread; i < pad_logit_rows; i += threads) {
    const int4 row = i < counts.y ? ReadHost(logit + i) : make_int4(-1, -1, 0, 0);
    arrays.logit_row[i] = row.x;
    arrays.logit_slot[i] = row.y;
    arrays.logit_position[i] = row.z;
    arrays.logit_scores[i] = static_cast<uint8_t>(row.w);
  }
  const auto* spans = reinterpret_cast<const int4*>(entry + io.inbox_layout.spans);
  for (int i = thread; i < counts.z; i += threads) {
    reinterpret_cast<int4*>(arrays.spans)[i] = ReadHost(spans + i);
  }
  const auto* updates = reinterpret_cast<const int32_t*>(entry + io.inbox_layout.updates);
  for (int i = thread; i < counts.w; i += threads) {
    const int64_t row = ReadHost(updates + 3 * i);
    arrays.block_table[row * arrays.table_stride + ReadHost(updates + 3 * i + 1)] =
        ReadHost(updates + 3 * i + 2);
  }
}

__global__ void __launch_bounds__(kThreads)
    PublishKernel(StepIo io, int logit_rows, const SampledRow* results,
                  const RowLogprobs* logprobs) {
  TriggerDependents();
  WaitForPrevious();
  const uint64_t sequence = *io.sequence;
  std::byte* entry = io.outbox + (sequence % kStepRing) * OutboxBytes(io.capacity);
  auto* rows = reinterpret_cast<SampledRow*>(entry + sizeof(StepStamp));
  for (int i = threadIdx.x; i < logit_rows; i += kThreads) rows[i] = results[i];
  if (logprobs != nullptr) {
    auto* to = reinterpret_cast<uint32_t*>(rows + io.capacity.logit_rows);
    const auto* from = reinterpret_cast<const uint32_t*>(logprobs);
    const int words = logit_rows * static_cast<int>(sizeof(RowLogprobs) / 4);
    for (int i = threadIdx.x; i < words; i += kThreads) to[i] = from[i];
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    auto* stamp = reinterpret_cast<StepStamp*>(entry);
    stamp->begin_ns = *io.begin_ns;
    stamp->sampling_begin_ns = __ldcg(io.sampling_begin_ns);
    stamp->collectives.wait_ns = __ldcg(&io.collectives->wait_ns);
    stamp->collectives.transfer_ns = __ldcg(&io.collectives->transfer_ns);
    stamp->collectives.aside_ns = __ldcg(&io.collectives->aside_ns);
    __stcg(io.sampling_begin_ns, uint64_t{0});
    __stcg(&io.collectives->wait_ns, uint64_t{0});
    __stcg(&io.collectives->transfer_ns, uint64_t{0});
    __stcg(&io.collectives->aside_ns, uint64_t{0});
    stamp->end_ns = DeviceClockNs();
    __threadfence_system();
    *reinterpret_cast<volatile uint64_t*>(&stamp->sequence) = sequence + 1;
    *io.sequence = sequence + 1;
  }
}

size_t Aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

InboxLayout MakeInboxLayout(const StepCapacity& capacity) {
  InboxLayout layout;
  size_t at = sizeof(StepHeader);
  const auto take = [&at](size_t bytes) {
    const size_t begin = at;
    at += Aligned(bytes);
    return begin;
  };
  layout.slot = take(capacity.rows * sizeof(int32_t));
  layout.position = take(capacity.rows * sizeof(int32_t));
  layout.logit_rows = take(capacity.logit_rows * sizeof(LogitRowInput));
  layout.spans = take(capacity.spans * sizeof(PrefillSpan));
  layout.updates = take(capacity.updates * sizeof(TableUpdate));
  layout.bytes = at;
  return layout;
}

cudaError_t PrepareStep(const Launch& launch, const StepIo& io, const StepArrays& arrays,
                        int pad_rows, int pad_logit_rows) {
  if (pad_rows > io.capacity.rows || pad_logit_rows > io.capacity.logit_rows) {
    return cudaErrorInvalidValue;
  }
  const int items = std::max(pad_rows, pad_logit_rows);
  const unsigned blocks =
      static_cast<unsigned>(std::clamp((items + kThreads - 1) / kThreads, 1, 32));
  return LaunchKernel(launch, PrepareKernel, dim3(blocks), dim3(kThreads), 0, 1, io, arrays,
                      pad_rows, pad_logit_rows);
}

cudaError_t PublishStep(const Launch& launch, const StepIo& io, int logit_rows,
                        const SampledRow* results, const RowLogprobs* logprobs) {
  if (logit_rows > io.capacity.logit_rows) return cudaErrorInvalidValue;
  return LaunchKernel(launch, PublishKernel, dim3(1), dim3(kThreads), 0, 1, io, logit_rows, results,
                      logprobs);
}

}  // namespace lockstep::kernels
