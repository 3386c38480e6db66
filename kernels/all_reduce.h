// All-reduce of [rows][hidden] among the GPUs of one host by writing into each
// other's memory, alone or fused with what follows it in a decoder layer:
//
//   sum      = in of rank 0 + in of rank 1 + ... + bias      fp32, in rank order
//   residual = round(sum + residual)
//   out      = round(residual / rms(residual) * weight)      rms over the rounded residual
//
// The sum is formed in the same order on every rank, whatever the path: results
// are bitwise equal on all ranks, from run to run, and whatever rows travel with
// a row. (A NaN stays a NaN, its payload may change.)
//
//   one-shot  every rank pushes its rows to every other and sums for itself:
//             one crossing, (size - 1) messages sent
//             The product that makes the rows may push them in its epilogue (ExchangePush):
//             then the kernel only collects, and the crossing is behind the product's end
//   two-shot  columns are dealt out in stretches of 32 vectors; each rank sums its
//             own and pushes the result: two crossings, 2 (size - 1) / size sent
//
// No flags: a receive slot is full of a word that no sender sends (an all-ones
// NaN; senders map it to another NaN), whoever has read a vector puts the word
// back. Two slots in turn: a rank can be at most one exchange ahead, because it
// ends none without a word from every other rank.
//
// All ranks make the same calls with the same arguments in the same order, each
// in the order of one stream. Any number of calls may be captured in CUDA graphs
// and replayed: which slot is next is counted on the device. A kernel waits at
// most peers.patience_ns, then fills in *peers.fault and traps; the context is
// lost. Once *peers.abort is set it ends soon, and the region is worthless. Grids that wait for
// each other must run at the same time: nothing that waits for the end of one of these kernels may
// hold up a peer's.
//
// Element types kF32, kF16, kBF16. Pointers 16-byte aligned (the all-gather's: 4).
#ifndef LOCKSTEP_KERNELS_ALL_REDUCE_H_
#define LOCKSTEP_KERNELS_ALL_REDUCE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/peers.h"
#include "kernels/types.h"

namespace lockstep::kernels {

// Where in the region these kernels live, and how many bytes of the sum one launch
// of each kind takes: larger messages are cut. The same on every rank.
struct ExchangeLayout {
  size_t offset = 0;  // a multiple of 256
  size_t one_shot_bytes = 256 << 10;
  size_t pushed_bytes = 0;  // of a one-shot whose rows a product pushes, where that is more
  size_t two_shot_bytes = 8 << 20;
  size_t gather_bytes = 1 << 20;  // one rank's part of a small all-gather
};

// What is fastest among `size` GPUs on NVLink.
ExchangeLayout DefaultExchangeLayout(int size);

// Of these kernels' part of the region, which begins at layout.offset.
size_t ExchangeRegionBytes(const ExchangeLayout& layout, int size);

// Makes one's own region ready; after it has completed on every rank, and every
// rank knows so, exchanges may begin.
cudaError_t ClearExchangeRegion(const ExchangeLayout& layout, int size, std::byte* own_base,
                                cudaStream_t stream);

// Loads every kernel of the family on the current device. Once, before the first
// launch: a lazy load may wait for the device, which waits for a peer.
cudaError_t InitAllReduce();

// Where the rows of the next one-shot go, a word at a time: see AllReduceArgs::pushed.
struct ExchangePush {
  std::byte* to[kMaxPeers] = {};  // of slot 0, this rank's part in each rank's region
  int rank = 0, size = 0;         // 0: nowhere
  size_t slot_bytes = 0;          // from one slot to the other
  const uint64_t* counter = nullptr;
};
ExchangePush OneShotPush(const Peers& peers, const ExchangeLayout& layout);

enum class AllReducePath : uint8_t {
  kNone,  // none does all that is asked; any takes the sum alone
  kOneShot,
  kTwoShot,
};

struct AllReduceArgs {
  Type type = Type::kBF16;
  int rows = 0;    // 0: nothing to do, on any rank
  int hidden = 0;  // elements of a row
  const void* in = nullptr;
  void* out = nullptr;  // may be `in`
  // Every rank's product, the kernel ahead, has pushed its rows; `in` is not read. With bias,
  // residual or norm, without slots.
  bool pushed = false;

  const void* bias = nullptr;      // [hidden], added once; or nullptr
  const void* residual = nullptr;  // [rows][hidden], or nullptr
  void* residual_out = nullptr;    // may be `residual`; or nullptr
  // nullptr: out receives the sum (+ bias) (+ residual).
  const void* norm_weight = nullptr;  // [hidden]
  float eps = 1e-5f;
  bool plus_one = false;  // weight + 1 is what multiplies
  // [rows] on the device, or nullptr. -1: the row is padding and its outputs stay as they are.
  const int32_t* slots = nullptr;

  int max_blocks = 0;  // 0: as many as the message has use for
  // Blocks that share a row, at most 8 and 512 vectors each; 0: by the width. The
  // order in which the norm adds up depends on it.
  int blocks_per_row = 0;
};

// Which path takes it. With a norm or `slots` a row must be whole vectors of 16
// bytes and at most 4,096 of them; otherwise any rows and hidden.
AllReducePath ChooseAllReduce(const AllReduceArgs& args, const ExchangeLayout& layout, int size);

// cudaErrorInvalidValue: the path does not take it (as ChooseAllReduce says).
cudaError_t AllReduce(const Launch& launch, const Peers& peers, const ExchangeLayout& layout,
                      AllReducePath path, const AllReduceArgs& args);

// Every rank's `bytes` from `in`, in rank order, into out [size][bytes] on every
// rank. bytes: a multiple of 4; more than layout.gather_bytes go in pieces. in must not lie in out.
cudaError_t SmallAllGather(const Launch& launch, const Peers& peers, const ExchangeLayout& layout,
                           const void* in, void* out, size_t bytes);

// Around a transfer that is not by these kernels: what passes on the stream between the
// two marks becomes part of clock->transfer_ns or, by kEndAside, of aside_ns. One at a time.
enum class TransferMark { kBegin, kEnd, kEndAside };
cudaError_t MarkTransfer(cudaStream_t stream, CollectiveClock* clock, TransferMark mark);

}  // namespace lockstep::kernels

#endif  // LOCKSTEP_KERNELS_ALL_REDUCE_H_
