// The sampling phases' front door: checks, and who gets which part of the workspace.
#include <algorithm>

#include "kernels/sample.h"
#include "kernels/sample_internal.cuh"

namespace lockstep::kernels {
namespace sample {
namespace {

template <typename T>
T* Take(char* base, size_t count, size_t* bytes) {
  T* at = base == nullptr ? nullptr : reinterpret_cast<T*>(base + *bytes);
  *bytes += (count * sizeof(T) + 255) / 256 * 256;
  return at;
}

}  // namespace

Workspace LayOut(const SampleNeeds& needs, int rows, int columns, void* base) {
  char* const at = static_cast<char*>(base);
  const size_t n = static_cast<size_t>(rows);
  const size_t chunks = static_cast<size_t>(NumChunks(columns));
  Workspace w;
  w.adjusted_stride = (columns + 3) / 4 * 4;
  if (needs.adjust) {
    w.adjusted = Take<float>(at, n * static_cast<size_t>(w.adjusted_stride), &w.bytes);
  }
  if (needs.cut) w.cuts = Take<RowCut>(at, n, &w.bytes);
  if (needs.draw) w.masses = Take<MassPart>(at, n * chunks, &w.bytes);
  if (needs.score) w.scores = Take<ScorePart>(at, n * chunks, &w.bytes);
  return w;
}

namespace {

// Every lane of a warp takes a rank.
constexpr int kMaxRanks = 32;

bool Exchanges(const SampleArgs& a) {
  for (const SamplePhase phase : kSamplePhases) {
    if (!HasPhase(a.needs, phase) || SampleExchangeBytes(phase) == 0) continue;
    if (a.send[phase] == nullptr || a.gathered[phase] == nullptr) return false;
  }
  return true;
}

bool Valid(const SampleArgs& a) {
  return a.rows > 0 && a.rows <= 65535 && a.tp_size > 0 && a.tp_size <= kMaxRanks && a.rank >= 0 &&
         a.rank < a.tp_size && a.columns >= 0 && a.columns <= kChunk * kMaxChunks &&
         a.logits_stride >= a.columns && (a.logits != nullptr || a.columns == 0) &&
         a.slot != nullptr && a.position != nullptr && a.params != nullptr && a.tokens != nullptr &&
         a.results != nullptr && (!a.needs.score || a.logprobs != nullptr) &&
         (!a.needs.cut || a.needs.draw) && (!a.needs.nested || a.needs.cut) && Exchanges(a);
}

}  // namespace
}  // namespace sample

size_t SampleWorkspaceBytes(const SampleNeeds& needs, int rows, int columns) {
  return sample::LayOut(needs, rows, columns, nullptr).bytes;
}

cudaError_t RunSamplePhase(const Launch& launch, SamplePhase phase, const SampleArgs& args) {
  sample::Job job;
  job.a = args;
  if (!sample::Valid(args) || !HasPhase(args.needs, phase)) return cudaErrorInvalidValue;
  job.w = sample::LayOut(args.needs, args.rows, args.columns, args.workspace);
  if (job.w.bytes > 0 && args.workspace == nullptr) return cudaErrorInvalidValue;
  job.chunks = sample::NumChunks(args.columns);
  switch (phase) {
    case kMaximum:
      return sample::RunMaximum(launch, job);
    case kCoarse:
      return sample::RunCoarse(launch, job);
    case kFine:
      return sample::RunFine(launch, job);
    case kNested:
      return sample::RunNested(launch, job);
    case kMass:
      return sample::RunMass(launch, job);
    case kChoose:
      return sample::RunChoose(launch, job);
    case kScore:
      return sample::RunScore(launch, job);
    case kFinish:
      return sample::RunFinish(launch, job);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lockstep::kernels
