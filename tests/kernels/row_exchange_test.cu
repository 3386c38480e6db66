// The all-reduce by rows dealt out: exact sums of small integers, hundreds of exchanges behind
// each other without the host, ranks that come late; what it does when one never comes.
#include <cuda_bf16.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "kernels/device.cuh"
#include "kernels/row_exchange.h"
#include "tests/kernels/virtual_ranks.h"

namespace lockstep::kernels::testing {
namespace {

constexpr uint32_t kPoison = 0xA5A5A5A5u;

__host__ __device__ float Value(int rank, int round, int64_t i) {
  return static_cast<float>((i * 7 + int64_t{rank} * 13 + int64_t{round} * 5) % 31 - 15);
}
__host__ __device__ float Sum(int size, int round, int64_t i) {
  float sum = 0.0f;
  for (int r = 0; r < size; ++r) sum += Value(r, round, i);
  return sum;
}

template <typename T>
__global__ void FillKernel(T* data, int64_t count, int rank, int round) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    data[i] = T(Value(rank, round, i));
  }
}
// What the caller makes of its rows: half of the sum, and a number a row.
template <typename T>
__global__ void MakeKernel(const T* data, T* made, float* marks, int hidden, RowShare own,
                           int round) {
  const int64_t begin = int64_t{own.first} * hidden, end = begin + int64_t{own.rows} * hidden;
  for (int64_t i = begin + blockIdx.x * blockDim.x + threadIdx.x; i < end;
       i += gridDim.x * blockDim.x) {
    made[i] = T(0.5f * float(data[i]));
    if (i % hidden == 0) marks[i / hidden] = static_cast<float>(i / hidden + round);
  }
}
template <typename T>
__global__ void CheckKernel(const T* data, const T* made, const float* marks, int64_t count,
                            int hidden, RowShare own, int rank, int size, int round,
                            unsigned* errors) {
  const int64_t begin = int64_t{own.first} * hidden, end = begin + int64_t{own.rows} * hidden;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const float sum = Sum(size, round, i);
    const bool mine = i >= begin && i < end;
    bool right = float(data[i]) == (mine ? sum : Value(rank, round, i));
    right = right && float(made[i]) == 0.5f * sum;
    if (i % hidden == 0)
      right = right && marks[i / hidden] == static_cast<float>(i / hidden + round);
    if (!right) atomicAdd(errors, 1u);
  }
}
__global__ void SpinKernel(uint64_t ns) {
  const uint64_t begin = DeviceClockNs();
  while (DeviceClockNs() - begin < ns) {
  }
}

template <typename T>
constexpr Type kType = sizeof(T) == 4 ? Type::kF32 : Type::kBF16;

// A kernel is loaded when it is first launched, and not while others wait for it.
template <typename T>
void Load() {
  cudaFuncAttributes attributes;
  for (const void* kernel :
       {reinterpret_cast<const void*>(FillKernel<T>), reinterpret_cast<const void*>(MakeKernel<T>),
        reinterpret_cast<const void*>(CheckKernel<T>), reinterpret_cast<const void*>(SpinKernel)}) {
    ASSERT_CUDA(cudaFuncGetAttributes(&attributes, kernel));
  }
}

// Where things lie in a region that has room for `rows`.
struct Layout {
  Layout(int rows, int hidden, size_t element, int size)
      : inbox(AlignedInRegion(MostRowsOfShare(rows, size) * hidden * element)),
        made(RowExchangeBytes(inbox, size)),
        marks(made + AlignedInRegion(rows * hidden * element)),
        guard(marks + AlignedInRegion(rows * sizeof(float))),
        bytes(guard + 256) {}
  size_t inbox, made, marks, guard, bytes;
};

class Group {
 public:
  Group(int size, const Layout& layout)
      : layout_(layout), ranks_(size, ExchangeLayout{.offset = layout.bytes}) {
    for (int r = 0; r < size; ++r) {
      ranks_.Use(r);
      EXPECT_EQ(InitRowExchange(), cudaSuccess);
      std::byte* const base = ranks_.peers(r).base[r];
      EXPECT_EQ(cudaMemset(base, 0xA5, layout.bytes), cudaSuccess);
      EXPECT_EQ(ClearRowExchange(base, nullptr), cudaSuccess);
    }
    ranks_.SynchronizeDevices();
  }
  VirtualRanks& ranks() { return ranks_; }
  RowExchange exchange(int rank) const {
    return {.peers = ranks_.peers(rank), .offset = 0, .inbox_bytes = layout_.inbox};
  }
  void ExpectGuards() const {
    for (int r = 0; r < ranks_.size(); ++r) {
      ranks_.Use(r);
      std::vector<uint32_t> guard(64);
      ASSERT_CUDA(cudaMemcpy(guard.data(), ranks_.peers(r).base[r] + layout_.guard, 256,
                             cudaMemcpyDeviceToHost));
      EXPECT_EQ(guard, std::vector<uint32_t>(64, kPoison)) << "rank " << r;
    }
  }

 private:
  const Layout layout_;
  VirtualRanks ranks_;
};

// `rounds` exchanges of at most `rows`, the rows of a round in turns.
template <typename T>
void ExpectExactRounds(int size, int rows, int hidden, int rounds) {
  SCOPED_TRACE(::testing::Message() << size << " ranks, " << rows << " rows of " << hidden << " x "
                                    << sizeof(T) << " bytes");
  const Layout layout(rows, hidden, sizeof(T), size);
  Group group(size, layout);
  VirtualRanks& ranks = group.ranks();
  std::vector<Guarded> data, errors;
  for (int r = 0; r < size; ++r) {
    ranks.Use(r);
    Load<T>();
    data.emplace_back(size_t(rows) * hidden * sizeof(T));
    errors.emplace_back(sizeof(unsigned));
    errors[r].Set(std::vector<unsigned>(1, 0));
  }
  ranks.SynchronizeDevices();
  for (int round = 0; round < rounds; ++round) {
    const int now = round % 3 == 1 ? (rows + 1) / 2 : round % 3 == 2 ? 1 : rows;
    const int64_t count = int64_t{now} * hidden;
    const uint32_t number = 1 + 2 * round;
    // Every rank's sum before any rank's gather: under a sanitizer a copy holds the host up.
    for (int r = 0; r < size; ++r) {
      ranks.Use(r);
      const cudaStream_t stream = ranks.launch(r).stream;
      T* const values = static_cast<T*>(data[r].get());
      FillKernel<<<8, 256, 0, stream>>>(values, count, r, round);
      if ((round * 5 + r) % 7 == 0) SpinKernel<<<1, 1, 0, stream>>>(200'000);
      ASSERT_CUDA(SumRows(
          stream, group.exchange(r),
          {.type = kType<T>, .rows = now, .hidden = hidden, .data = values, .number = number}));
    }
    for (int r = 0; r < size; ++r) {
      ranks.Use(r);
      const cudaStream_t stream = ranks.launch(r).stream;
      T* const values = static_cast<T*>(data[r].get());
      std::byte* const base = ranks.peers(r).base[r];
      T* const made = reinterpret_cast<T*>(base + layout.made);
      auto* const marks = reinterpret_cast<float*>(base + layout.marks);
      const RowShare own = ShareOf(now, r, size);
      MakeKernel<<<8, 256, 0, stream>>>(values, made, marks, hidden, own, round);
      const GatheredRows arrays[] = {{layout.made, hidden * sizeof(T)},
                                     {layout.marks, sizeof(float)}};
      ASSERT_CUDA(GatherRows(stream, group.exchange(r), arrays, 2, now, number));
      CheckKernel<<<8, 256, 0, stream>>>(values, made, marks, count, hidden, own, r, size, round,
                                         static_cast<unsigned*>(errors[r].get()));
      ASSERT_CUDA(cudaGetLastError());
    }
  }
  ranks.Synchronize();
  if (::testing::Test::HasFatalFailure()) return;
  for (int r = 0; r < size; ++r) {
    ranks.Use(r);
    EXPECT_EQ(errors[r].Get<unsigned>()[0], 0u) << "rank " << r;
    EXPECT_TRUE(data[r].GuardsIntact());
  }
  group.ExpectGuards();
}

TEST(RowExchangeTest, SumsExactlyHoweverManyRowsAndRanks) {
  const int rounds = SanitizerRun() ? 3 : 12;
  for (const int size : {2, 3, 4, 8}) {
    for (const int rows : {1, 2, 7, 130}) {
      ExpectExactRounds<__nv_bfloat16>(size, rows, 8, rounds);
      ExpectExactRounds<float>(size, rows, 260, rounds);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(RowExchangeTest, HundredsOfLongExchangesBehindEachOther) {
  for (const int size : {2, 4}) {
    ExpectExactRounds<__nv_bfloat16>(size, SanitizerRun() ? 37 : 1'537, 4'096,
                                     SanitizerRun() ? 6 : 300);
  }
}

TEST(RowExchangeTest, EveryRowHasOneOwner) {
  for (const int size : {1, 2, 3, 4, 8}) {
    for (int rows = 0; rows < 40; ++rows) {
      int next = 0;
      for (int r = 0; r < size; ++r) {
        const RowShare share = ShareOf(rows, r, size);
        EXPECT_EQ(share.first, next);
        EXPECT_LE(share.rows, MostRowsOfShare(rows, size));
        next += share.rows;
      }
      EXPECT_EQ(next, rows);
    }
  }
}

TEST(RowExchangeTest, RefusesWhatDoesNotFit) {
  const Layout layout(8, 64, 4, 2);
  Group group(2, layout);
  group.ranks().Use(0);
  Guarded data(16 * 64 * 4);
  SumRowsArgs args = {
      .type = Type::kF32, .rows = 16, .hidden = 64, .data = data.get(), .number = 1};
  const cudaStream_t stream = group.ranks().launch(0).stream;
  EXPECT_EQ(SumRows(stream, group.exchange(0), args), cudaErrorInvalidValue);
  args.rows = 8;
  args.hidden = 63;
  EXPECT_EQ(SumRows(stream, group.exchange(0), args), cudaErrorInvalidValue);
  args.hidden = 64;
  args.data = static_cast<std::byte*>(data.get()) + 4;
  EXPECT_EQ(SumRows(stream, group.exchange(0), args), cudaErrorMisalignedAddress);
}

// Once the group is given up the waits end, and the context is as good as before.
TEST(RowExchangeTest, EndsOnceTheGroupIsGivenUp) {
  const Layout layout(8, 64, 4, 2);
  Group group(2, layout);
  group.ranks().Use(0);
  uint32_t* abort = nullptr;
  ASSERT_CUDA(cudaHostAlloc(&abort, sizeof(*abort), cudaHostAllocMapped));
  *abort = 0;
  Guarded aborted(sizeof(uint32_t)), data(8 * 64 * 4);
  aborted.Set(std::vector<uint32_t>(1, 0));
  RowExchange exchange = group.exchange(0);
  exchange.peers.abort = abort;
  exchange.peers.aborted = static_cast<uint32_t*>(aborted.get());
  const cudaStream_t stream = group.ranks().launch(0).stream;
  ASSERT_CUDA(
      SumRows(stream, exchange,
              {.type = Type::kF32, .rows = 8, .hidden = 64, .data = data.get(), .number = 1}));
  EXPECT_EQ(cudaStreamQuery(stream), cudaErrorNotReady);  // rank 1 never comes
  *reinterpret_cast<volatile uint32_t*>(abort) = 1;
  ASSERT_CUDA(cudaStreamSynchronize(stream));
  EXPECT_EQ(aborted.Get<uint32_t>()[0], 1u);
  cudaFreeHost(abort);
}

// In a process of its own: the trap takes the context with it.
[[noreturn]] void WaitForAMissingRank() {
  const Layout layout(8, 64, 4, 3);
  Group group(3, layout);
  VirtualRanks& ranks = group.ranks();
  ranks.set_patience_ns(30'000'000);
  std::vector<Guarded> data;
  for (int r = 0; r < 3; ++r) {
    ranks.Use(r);
    data.emplace_back(8 * 64 * 4);
  }
  for (const int r : {0, 2}) {
    ranks.Use(r);
    SumRows(ranks.launch(r).stream, group.exchange(r),
            {.type = Type::kF32, .rows = 8, .hidden = 64, .data = data[r].get(), .number = 1});
  }
  ranks.ReportFault();
}

TEST(RowExchangeDeathTest, NamesTheRankThatDidNotCome) {
  if (SanitizerRun()) return;  // a trap is a report there
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(WaitForAMissingRank(), ::testing::ExitedWithCode(0),
              "failed 1 code 7 exchange 1 rank 1");
}

}  // namespace
}  // namespace lockstep::kernels::testing
