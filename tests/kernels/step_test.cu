// What the host writes into the inbox is what a step reads, and what the step made
// is what the outbox holds, over several rounds of both rings and at every count.
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kernels/step.h"
#include "tests/kernels/device_rows.h"

namespace lockstep::kernels {
namespace {

// Mapped memory of the host between guards, all of it filled with a pattern.
class Mapped {
 public:
  explicit Mapped(size_t bytes) : bytes_(bytes) {
    EXPECT_EQ(
        cudaHostAlloc(reinterpret_cast<void**>(&memory_), bytes + 2 * kGuard, cudaHostAllocMapped),
        cudaSuccess);
    EXPECT_EQ(cudaHostGetDevicePointer(reinterpret_cast<void**>(&device_), memory_, 0),
              cudaSuccess);
    std::memset(memory_, kPattern, bytes + 2 * kGuard);
  }
  ~Mapped() { cudaFreeHost(memory_); }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  std::byte* get() const { return memory_ + kGuard; }
  std::byte* device() const { return device_ + kGuard; }
  bool Untouched(size_t begin, size_t end) const {
    for (size_t i = begin; i < end; ++i) {
      if (get()[i] != std::byte{kPattern}) return false;
    }
    return true;
  }
  void ExpectGuards() const {
    for (size_t i = 0; i < kGuard; ++i) {
      ASSERT_EQ(memory_[i], std::byte{kPattern}) << "before it";
      ASSERT_EQ(memory_[kGuard + bytes_ + i], std::byte{kPattern}) << "after it";
    }
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr unsigned char kPattern = 0xa5;
  const size_t bytes_;
  std::byte* memory_ = nullptr;
  std::byte* device_ = nullptr;
};

struct Shape {
  int rows, logit_rows, spans, updates;
  int pad_rows, pad_logit_rows;
};

// None, one, beside the width of a block, more than the largest grid has threads;
// more updates than rows; capacities of both parities.
std::vector<Shape> Shapes() {
  std::vector<Shape> shapes = {{0, 0, 0, 0, 1, 1},           {1, 1, 0, 0, 1, 1},
                               {1, 1, 0, 1, 4, 4},           {3, 3, 0, 900, 3, 3},
                               {17, 5, 2, 7, 17, 5},         {255, 1, 3, 64, 256, 8},
                               {257, 257, 300, 33, 264, 264}};
  if (SanitizerRun()) return shapes;
  shapes.insert(shapes.end(), {{2049, 130, 9, 500, 2049, 131}, {9001, 1024, 70, 9300, 9001, 1024}});
  return shapes;
}

constexpr int kSlots = 301, kStride = 67;

// A worker's side of the rings, and what they must lead to.
class Rings {
 public:
  Rings(const Shape& shape, bool odd)
      : shape_(shape),
        capacity_{.rows = shape.pad_rows + 3,
                  .logit_rows = (shape.pad_logit_rows + 3) / 2 * 2 + (odd ? 1 : 0),
                  .spans = shape.spans + 2,
                  .updates = shape.updates + 1},
        layout_(MakeInboxLayout(capacity_)),
        inbox_(layout_.bytes * kStepRing),
        outbox_(OutboxBytes(capacity_) * kStepRing),
        slot(capacity_.rows),
        position(capacity_.rows),
        logit_row(capacity_.logit_rows),
        logit_slot(capacity_.logit_rows),
        logit_position(capacity_.logit_rows),
        logit_scores(capacity_.logit_rows),
        spans(capacity_.spans),
        table(kSlots * kStride),
        results(capacity_.logit_rows),
        logprobs(capacity_.logit_rows),
        sequence(1),
        begin_ns(1),
        sampling_begin_ns(1),
        clock(1) {
    sequence.PutBits({0});
    begin_ns.PutBits({0});
    wanted_table_.assign(kSlots * kStride, 0);
    DeviceRows<int32_t>& cleared = table;
    cleared.PutBits(wanted_table_);
  }

  StepIo Io() const {
    StepIo io;
    io.inbox = inbox_.device();
    io.outbox = outbox_.device();
    io.sequence = sequence.get();
    io.begin_ns = begin_ns.get();
    io.sampling_begin_ns = sampling_begin_ns.get();
    io.collectives = clock.get();
    io.inbox_layout = layout_;
    io.capacity = capacity_;
    return io;
  }
  StepArrays Arrays() const {
    return {.slot = slot.get(),
            .position = position.get(),
            .logit_row = logit_row.get(),
            .logit_slot = logit_slot.get(),
            .logit_position = logit_position.get(),
            .logit_scores = logit_scores.get(),
            .spans = spans.get(),
            .block_table = table.get(),
            .table_stride = kStride};
  }

  // Step `number` (from 0) as the host writes it; other entries keep what they had.
  void Write(int number) {
    std::mt19937 random(17 * number + shape_.rows);
    const auto word = [&random] { return static_cast<int32_t>(random() & 0x7fffffff); };
    std::byte* entry = inbox_.get() + static_cast<size_t>(number % kStepRing) * layout_.bytes;
    const StepHeader header = {.rows = shape_.rows,
                               .logit_rows = shape_.logit_rows,
                               .spans = shape_.spans,
                               .updates = shape_.updates};
    std::memcpy(entry, &header, sizeof(header));
    rows_.clear();
    for (int i = 0; i < shape_.rows; ++i) rows_.emplace_back(word(), word());
    for (int i = 0; i < shape_.rows; ++i) {
      std::memcpy(entry + layout_.slot + 4 * i, &rows_[i].first, 4);
      std::memcpy(entry + layout_.position + 4 * i, &rows_[i].second, 4);
    }
    logit_rows_.clear();
    for (int i = 0; i < shape_.logit_rows; ++i) {
      logit_rows_.push_back({word(), word(), word(), word() % 2});
      std::memcpy(entry + layout_.logit_rows + sizeof(LogitRowInput) * i, &logit_rows_[i],
                  sizeof(LogitRowInput));
    }
    spans_.clear();
    for (int i = 0; i < shape_.spans; ++i) {
      spans_.push_back({word(), word(), word(), word()});
      std::memcpy(entry + layout_.spans + sizeof(PrefillSpan) * i, &spans_[i], sizeof(PrefillSpan));
    }
    std::set<std::pair<int, int>> places;
    while (static_cast<int>(places.size()) < shape_.updates) {
      places.emplace(word() % kSlots, word() % kStride);
    }
    int i = 0;
    for (const auto& [at_slot, index] : places) {
      const TableUpdate update = {at_slot, index, word()};
      std::memcpy(entry + layout_.updates + sizeof(TableUpdate) * i++, &update, sizeof(update));
      wanted_table_[at_slot * kStride + index] = update.block;
    }
  }

  // What the device's own kernels would have left.
  void Sample(int number) {
    std::vector<SampledRow> sampled(capacity_.logit_rows);
    std::vector<RowLogprobs> scored(capacity_.logit_rows);
    for (int i = 0; i < capacity_.logit_rows; ++i) {
      sampled[i] = {1000 * number + i, static_cast<uint32_t>(i % 3)};
      scored[i].logprob = -0.5f * static_cast<float>(i + number);
      scored[i].rank = static_cast<uint32_t>(i + 1);
      for (int t = 0; t < kMaxTopLogprobs; ++t) {
        scored[i].top_id[t] = i * 31 + t + number;
        scored[i].top_logprob[t] = -0.25f * static_cast<float>(t + i);
      }
    }
    results.PutBits(sampled);
    logprobs.PutBits(scored);
    sampling_begin_ns.PutBits({static_cast<uint64_t>(77 + number)});
    clock.PutBits({{static_cast<uint64_t>(5 + number), static_cast<uint64_t>(9 + number),
                    static_cast<uint64_t>(13 + number)}});
  }

  void ExpectArrays(const std::string& what) const {
    const std::vector<int32_t> slots = slot.Bits(), positions = position.Bits();
    for (int i = 0; i < capacity_.rows; ++i) {
      if (i >= shape_.pad_rows) {
        ASSERT_TRUE(DeviceRows<int32_t>::Untouched(slots[i])) << what << " slot " << i;
        ASSERT_TRUE(DeviceRows<int32_t>::Untouched(positions[i])) << what << " position " << i;
        continue;
      }
      const bool live = i < shape_.rows;
      ASSERT_EQ(slots[i], live ? rows_[i].first : -1) << what << " row " << i;
      ASSERT_EQ(positions[i], live ? rows_[i].second : 0) << what << " row " << i;
    }
    const std::vector<int32_t> row = logit_row.Bits(), row_slot = logit_slot.Bits(),
                               row_position = logit_position.Bits();
    const std::vector<uint8_t> scores = logit_scores.Bits();
    for (int i = 0; i < capacity_.logit_rows; ++i) {
      if (i >= shape_.pad_logit_rows) {
        ASSERT_TRUE(DeviceRows<int32_t>::Untouched(row[i])) << what << " logit row " << i;
        ASSERT_TRUE(DeviceRows<uint8_t>::Untouched(scores[i])) << what << " logit row " << i;
        continue;
      }
      const LogitRowInput wanted = i < shape_.logit_rows ? logit_rows_[i] : LogitRowInput{};
      ASSERT_EQ(row[i], wanted.row) << what << " logit row " << i;
      ASSERT_EQ(row_slot[i], wanted.slot) << what << " logit row " << i;
      ASSERT_EQ(row_position[i], wanted.position) << what << " logit row " << i;
      ASSERT_EQ(scores[i], wanted.scores) << what << " logit row " << i;
    }
    const std::vector<PrefillSpan> got = spans.Bits();
    for (int i = 0; i < capacity_.spans; ++i) {
      if (i >= shape_.spans) {
        ASSERT_TRUE(DeviceRows<PrefillSpan>::Untouched(got[i])) << what << " span " << i;
      } else {
        ASSERT_EQ(std::memcmp(&got[i], &spans_[i], sizeof(got[i])), 0) << what << " span " << i;
      }
    }
    ASSERT_EQ(table.Bits(), wanted_table_) << what;
    for (const auto* each : {&slot, &position, &logit_row, &logit_slot, &logit_position, &table}) {
      each->ExpectGuards(what);
    }
    logit_scores.ExpectGuards(what);
    spans.ExpectGuards(what);
  }

  // The entry of step `number`; with log-probabilities or without.
  void ExpectOutbox(int number, bool scored, const std::string& what) const {
    const size_t bytes = OutboxBytes(capacity_);
    const size_t begin = static_cast<size_t>(number % kStepRing) * bytes;
    StepStamp stamp;
    std::memcpy(static_cast<void*>(&stamp), outbox_.get() + begin, sizeof(stamp));
    ASSERT_EQ(stamp.sequence, static_cast<uint64_t>(number + 1)) << what;
    ASSERT_GT(stamp.begin_ns, 0u) << what;
    ASSERT_GE(stamp.end_ns, stamp.begin_ns) << what;
    ASSERT_EQ(stamp.sampling_begin_ns, static_cast<uint64_t>(77 + number)) << what;
    ASSERT_EQ(stamp.collectives.wait_ns, static_cast<uint64_t>(5 + number)) << what;
    ASSERT_EQ(stamp.collectives.transfer_ns, static_cast<uint64_t>(9 + number)) << what;
    ASSERT_EQ(stamp.collectives.aside_ns, static_cast<uint64_t>(13 + number)) << what;
    size_t at = begin + sizeof(StepStamp);
    const size_t sampled = shape_.logit_rows * sizeof(SampledRow);
    const std::vector<SampledRow> wanted = results.Bits();
    ASSERT_EQ(std::memcmp(outbox_.get() + at, wanted.data(), sampled), 0) << what;
    ASSERT_TRUE(number >= kStepRing ||
                outbox_.Untouched(at + sampled, at + capacity_.logit_rows * sizeof(SampledRow)))
        << what << ": more rows than were sampled";
    at += capacity_.logit_rows * sizeof(SampledRow);
    const size_t scores = scored ? shape_.logit_rows * sizeof(RowLogprobs) : 0;
    const std::vector<RowLogprobs> wanted_scores = logprobs.Bits();
    ASSERT_EQ(std::memcmp(outbox_.get() + at, wanted_scores.data(), scores), 0) << what;
    if (number < kStepRing) {
      ASSERT_TRUE(outbox_.Untouched(at + scores, begin + bytes)) << what;
      ASSERT_TRUE(outbox_.Untouched(begin + bytes, bytes * kStepRing)) << what << ": a later entry";
    }
    outbox_.ExpectGuards();
    inbox_.ExpectGuards();
    // Ready for the next step.
    ASSERT_EQ(sequence.Bits()[0], static_cast<uint64_t>(number + 1)) << what;
    ASSERT_EQ(sampling_begin_ns.Bits()[0], 0u) << what;
    const CollectiveClock cleared = clock.Bits()[0];
    ASSERT_EQ(cleared.wait_ns + cleared.transfer_ns + cleared.aside_ns, 0u) << what;
    for (const auto* each : {&sequence, &begin_ns, &sampling_begin_ns}) each->ExpectGuards(what);
    clock.ExpectGuards(what);
  }

 private:
  const Shape shape_;
  const StepCapacity capacity_;
  const InboxLayout layout_;
  const Mapped inbox_, outbox_;
  std::vector<std::pair<int32_t, int32_t>> rows_;
  std::vector<LogitRowInput> logit_rows_;
  std::vector<PrefillSpan> spans_;
  std::vector<int32_t> wanted_table_;

 public:
  DeviceRows<int32_t> slot, position, logit_row, logit_slot, logit_position;
  DeviceRows<uint8_t> logit_scores;
  DeviceRows<PrefillSpan> spans;
  DeviceRows<int32_t> table;
  DeviceRows<SampledRow> results;
  DeviceRows<RowLogprobs> logprobs;
  DeviceRows<uint64_t> sequence, begin_ns, sampling_begin_ns;
  DeviceRows<CollectiveClock> clock;
};

std::string Describe(const Shape& s, bool odd, int number) {
  return std::to_string(s.rows) + " rows, " + std::to_string(s.logit_rows) + " logit rows, " +
         std::to_string(s.updates) + " updates, " + (odd ? "odd" : "even") + " capacity, step " +
         std::to_string(number);
}

TEST(Step, CarriesEveryCountThroughBothRings) {
  for (const Shape& shape : Shapes()) {
    for (const bool odd : {false, true}) {
      Rings rings(shape, odd);
      for (int number = 0; number < 2 * kStepRing + 1; ++number) {
        const std::string what = Describe(shape, odd, number);
        const bool scored = number % 3 == 1;
        rings.Write(number);
        ASSERT_CUDA(
            PrepareStep({}, rings.Io(), rings.Arrays(), shape.pad_rows, shape.pad_logit_rows));
        ASSERT_CUDA(cudaDeviceSynchronize());
        rings.ExpectArrays(what);
        rings.Sample(number);
        ASSERT_CUDA(PublishStep({}, rings.Io(), shape.logit_rows, rings.results.get(),
                                scored ? rings.logprobs.get() : nullptr));
        ASSERT_CUDA(cudaDeviceSynchronize());
        rings.ExpectOutbox(number, scored, what);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Captured once: which entry is next is the device's to know.
TEST(Step, AGraphFindsEveryEntryInTurn) {
  const Shape shape = {
      .rows = 19, .logit_rows = 7, .spans = 3, .updates = 40, .pad_rows = 24, .pad_logit_rows = 8};
  Rings rings(shape, true);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  ASSERT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  ASSERT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  ASSERT_CUDA(PrepareStep({.stream = stream, .pdl = false}, rings.Io(), rings.Arrays(),
                          shape.pad_rows, shape.pad_logit_rows));
  ASSERT_CUDA(PublishStep({.stream = stream, .pdl = true}, rings.Io(), shape.logit_rows,
                          rings.results.get(), rings.logprobs.get()));
  ASSERT_CUDA(cudaStreamEndCapture(stream, &graph));
  ASSERT_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  for (int number = 0; number < 3 * kStepRing; ++number) {
    rings.Write(number);
    rings.Sample(number);
    ASSERT_CUDA(cudaDeviceSynchronize());
    ASSERT_CUDA(cudaGraphLaunch(exec, stream));
    ASSERT_CUDA(cudaStreamSynchronize(stream));
    rings.ExpectArrays(Describe(shape, true, number));
    rings.ExpectOutbox(number, true, Describe(shape, true, number));
    if (HasFatalFailure()) return;
  }
  ASSERT_CUDA(cudaGraphExecDestroy(exec));
  ASSERT_CUDA(cudaGraphDestroy(graph));
  ASSERT_CUDA(cudaStreamDestroy(stream));
}

TEST(StepLimits, EntriesAreAlignedAndRowsAboveTheCapacityRefused) {
  for (int logit_rows = 0; logit_rows < 9; ++logit_rows) {
    const StepCapacity capacity = {.rows = 5, .logit_rows = logit_rows, .spans = 1, .updates = 1};
    EXPECT_EQ(OutboxBytes(capacity) % alignof(StepStamp), 0u) << logit_rows;
    EXPECT_EQ(MakeInboxLayout(capacity).bytes % alignof(StepHeader), 0u) << logit_rows;
  }
  StepIo io;
  io.capacity = {.rows = 4, .logit_rows = 2, .spans = 1, .updates = 1};
  EXPECT_EQ(PrepareStep({}, io, {}, 5, 1), cudaErrorInvalidValue);
  EXPECT_EQ(PrepareStep({}, io, {}, 1, 3), cudaErrorInvalidValue);
  EXPECT_EQ(PublishStep({}, io, 3, nullptr, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace lockstep::kernels
