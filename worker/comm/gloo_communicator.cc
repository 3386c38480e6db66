#include "worker/comm/gloo_communicator.h"

#include <gloo/config.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstring>
#include <exception>
#include <limits>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "worker/comm/gloo_link.h"
#include "worker/comm/gloo_mesh.h"

namespace lockstep {
namespace {

using Clock = std::chrono::steady_clock;

enum Kind : uint32_t { kNone, kAllReduce, kGather, kBroadcast, kBarrier };
constexpr const char* kKindNames[] = {"nothing", "all-reduce", "gather", "broadcast", "barrier"};

constexpr int64_t kDefaultMaxSkewMs = 30'000;
// Above one segment, a message begins with this little, so that a peer's
// arrival is seen before its bulk.
constexpr size_t kFirstBytes = 4 << 10;
constexpr size_t kScatterBytes = 256 << 10;
// Segments sent ahead of those received. 2 * kAhead + kAckEvery <= kWindow, so
// that ranks that exchange never wait for acknowledgements.
constexpr size_t kAhead = 4;
static_assert(2 * kAhead + GlooLink::kAckEvery <= GlooLink::kWindow);

uint64_t NanosSince(Clock::time_point start) {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count());
}

// Segment i of a message of `bytes`: where it starts; SegmentStart(n) = bytes.
size_t NumSegments(size_t bytes) {
  if (bytes <= GlooLink::kSegmentBytes) return 1;
  return 1 + (bytes - kFirstBytes + GlooLink::kSegmentBytes - 1) / GlooLink::kSegmentBytes;
}
size_t SegmentStart(size_t bytes, size_t i) {
  if (i == 0) return 0;
  if (bytes <= GlooLink::kSegmentBytes) return bytes;
  return std::min(bytes, kFirstBytes + (i - 1) * GlooLink::kSegmentBytes);
}

// Thrown inside this file for a peer that breaks the protocol.
struct Mismatch : std::exception {};

absl::Span<const std::byte> AsBytes(absl::Span<const float> values) {
  return {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(float)};
}
absl::Span<std::byte> AsWritableBytes(absl::Span<float> values) {
  return {reinterpret_cast<std::byte*>(values.data()), values.size() * sizeof(float)};
}

CommunicatorOptions WithDefaults(CommunicatorOptions options) {
  if (options.max_skew_ms <= 0) options.max_skew_ms = kDefaultMaxSkewMs;
  return options;
}

class GlooCommunicator final : public RankCommunicator {
 public:
  explicit GlooCommunicator(const CommunicatorOptions& options)
      : options_(WithDefaults(options)), mesh_(options_) {
    struct sigaction action;
    if (sigaction(SIGPIPE, nullptr, &action) == 0 && action.sa_handler == SIG_DFL) {
      std::signal(SIGPIPE, SIG_IGN);
    }
  }

  int rank() const override { return options_.rank; }
  int size() const override { return options_.size; }
  std::optional<uint64_t> buffer_bytes() const override {
    return static_cast<uint64_t>(options_.size - 1) * GlooLink::kBufferBytes;
  }
  absl::Status Join(AddressExchange& exchange) override {
    if (options_.size == 1) return absl::OkStatus();
    absl::Status status = mesh_.Join(exchange);
    joined_ = status.ok();
    return status;
  }
  absl::Status AllReduceSum(absl::Span<float> values) override;
  absl::Status Gather(absl::Span<const float> mine, absl::Span<float> all, int root) override;
  absl::Status Broadcast(absl::Span<std::byte> data, int root) override;
  absl::Status Barrier() override;

  void Abort() override { mesh_.Abort(); }

 private:
  // Runs one collective: counts, times, and turns what is thrown into a status.
  template <typename Body>
  absl::Status Run(Kind kind, size_t bytes, Body body);
  absl::Status Fail(Kind kind, const std::string& what, absl::StatusCode code);

  void SendSegment(int to, absl::Span<const std::byte> message, size_t i);
  // Checks the header against the collective under way.
  absl::Span<const std::byte> ReceiveSegment(int from, size_t message_bytes, size_t i);
  void SendMessage(int to, absl::Span<const std::byte> message);

  // Sends `out` to each of `to` while taking a message of `in_bytes` from
  // `from` (-1: nobody). consume(offset, bytes) sees it piece by piece; a piece
  // of `out` is sent before the piece at the same place has been consumed.
  template <typename Consume>
  void Exchange(absl::Span<const int> to, int from, absl::Span<const std::byte> out,
                size_t in_bytes, Consume consume);
  void AddFrom(absl::Span<const int> to, int from, absl::Span<const float> out,
               absl::Span<float> sum);
  void ReduceByDoubling(absl::Span<float> values);
  void ReduceByHalving(absl::Span<float> values);

  const CommunicatorOptions options_;
  GlooMesh mesh_;
  bool joined_ = false;
  bool dead_ = false;
  uint32_t collective_ = 0;
  Kind kind_ = kNone;
  int peer_ = -1;         // who is being spoken to, for the message of a failure
  std::string mismatch_;  // what a Mismatch was about
  Clock::time_point blocked_since_;
};

absl::Status GlooCommunicator::Fail(Kind kind, const std::string& what, absl::StatusCode code) {
  dead_ = true;
  mesh_.Break();  // the other ranks fail now instead of at their own time limit
  std::string message = absl::StrCat(kKindNames[kind], " ", collective_, " of ", options_.id);
  if (mesh_.aborted()) return absl::AbortedError(absl::StrCat(message, ": aborted"));
  if (peer_ >= 0) absl::StrAppend(&message, ", rank ", peer_);
  return absl::Status(code, absl::StrCat(message, ": ", what));
}

template <typename Body>
absl::Status GlooCommunicator::Run(Kind kind, size_t bytes, Body body) {
  kind_ = kind;
  peer_ = -1;
  if (mesh_.aborted() || dead_ || (!joined_ && options_.size > 1)) {
    return Fail(kind, "the communicator is not usable", absl::StatusCode::kUnavailable);
  }
  if (bytes > std::numeric_limits<uint32_t>::max()) {
    return Fail(kind, absl::StrCat(bytes, " bytes: at most 4 GiB"),
                absl::StatusCode::kInvalidArgument);
  }
  ++collective_;
  ++stats_.count;
  if (options_.size == 1) return absl::OkStatus();
  const Clock::time_point start = Clock::now();
  const uint64_t wait_before = stats_.wait_ns;
  try {
    body();
  } catch (const Mismatch&) {
    return Fail(kind, mismatch_, absl::StatusCode::kFailedPrecondition);
  } catch (const std::exception& e) {
    if (Clock::now() - blocked_since_ >= std::chrono::milliseconds(options_.max_skew_ms)) {
      return Fail(kind, absl::StrCat("did not arrive within ", options_.max_skew_ms, " ms"),
                  absl::StatusCode::kDeadlineExceeded);
    }
    return Fail(kind, GlooMesh::Words(e), absl::StatusCode::kUnavailable);
  }
  const uint64_t total = NanosSince(start);
  stats_.transfer_ns += total - std::min(total, stats_.wait_ns - wait_before);
  return absl::OkStatus();
}

void GlooCommunicator::SendSegment(int to, absl::Span<const std::byte> message, size_t i) {
  peer_ = to;
  blocked_since_ = Clock::now();
  const size_t begin = SegmentStart(message.size(), i);
  const size_t end = SegmentStart(message.size(), i + 1);
  SegmentHeader header;
  header.collective = collective_;
  header.kind = kind_;
  header.total_bytes = static_cast<uint32_t>(message.size());
  mesh_.link(to).Send(header, message.subspan(begin, end - begin));
  stats_.bytes_sent += end - begin;
}

absl::Span<const std::byte> GlooCommunicator::ReceiveSegment(int from, size_t message_bytes,
                                                             size_t i) {
  peer_ = from;
  blocked_since_ = Clock::now();
  const GlooLink::Segment segment = mesh_.link(from).Receive();
  if (i == 0) stats_.wait_ns += NanosSince(blocked_since_);
  const SegmentHeader& h = segment.header;
  const size_t expected = SegmentStart(message_bytes, i + 1) - SegmentStart(message_bytes, i);
  if (h.collective != collective_ || h.kind != kind_ || h.total_bytes != message_bytes ||
      h.bytes != expected || segment.payload.size() != expected) {
    mismatch_ = absl::StrCat(
        "is at ", h.kind <= kBarrier ? kKindNames[h.kind] : "unknown collective", " ", h.collective,
        " of ", h.total_bytes, " bytes while this rank is at one of ", message_bytes, " bytes");
    throw Mismatch();
  }
  return segment.payload;
}

void GlooCommunicator::SendMessage(int to, absl::Span<const std::byte> message) {
  for (size_t i = 0; i < NumSegments(message.size()); ++i) SendSegment(to, message, i);
}

template <typename Consume>
void GlooCommunicator::Exchange(absl::Span<const int> to, int from, absl::Span<const std::byte> out,
                                size_t in_bytes, Consume consume) {
  const size_t num_out = to.empty() ? 0 : NumSegments(out.size());
  const size_t num_in = from < 0 ? 0 : NumSegments(in_bytes);
  size_t sent = 0, received = 0;
  while (sent < num_out || received < num_in) {
    for (; sent < num_out && (received == num_in || sent < received + kAhead); ++sent) {
      for (const int peer : to) SendSegment(peer, out, sent);
    }
    if (received == num_in) continue;
    consume(SegmentStart(in_bytes, received), ReceiveSegment(from, in_bytes, received));
    mesh_.link(from).Consumed();
    ++received;
  }
}

void GlooCommunicator::AddFrom(absl::Span<const int> to, int from, absl::Span<const float> out,
                               absl::Span<float> sum) {
  Exchange(to, from, AsBytes(out), sum.size() * sizeof(float),
           [&](size_t offset, absl::Span<const std::byte> bytes) {
             const float* other = reinterpret_cast<const float*>(bytes.data());
             float* mine = sum.data() + offset / sizeof(float);
             const size_t n = bytes.size() / sizeof(float);
             // IEEE addition commutes: which of the two is the lower block does not matter.
             for (size_t i = 0; i < n; ++i) mine[i] += other[i];
           });
}

void GlooCommunicator::ReduceByDoubling(absl::Span<float> values) {
  const int rank = options_.rank, size = options_.size;
  std::vector<int> to;
  for (int width = 1; width < size; width *= 2) {
    const int mine = rank / width * width;  // first rank of this block
    const int sibling = mine ^ width;
    const int siblings = std::min(width, size - sibling);  // ranks that exist there
    const int members = std::min(width, size - mine);
    if (siblings <= 0) continue;
    // Offset i of a block is served by offset i % (ranks there) of its sibling.
    const int at = rank - mine;
    to.clear();
    for (int i = at; i < siblings; i += members) to.push_back(sibling + i);
    AddFrom(to, sibling + at % siblings, values, values);
  }
}

void GlooCommunicator::ReduceByHalving(absl::Span<float> values) {
  struct Level {
    int partner;
    absl::Span<float> kept, given;
  };
  std::vector<Level> levels;
  absl::Span<float> range = values;
  for (int width = 1; width < options_.size; width *= 2) {
    // Halves start on a cache line of the message.
    const size_t middle = (range.size() / 2 + 15) / 16 * 16;
    const bool low = (options_.rank & width) == 0;
    Level level{options_.rank ^ width, range.first(middle), range.subspan(middle)};
    if (!low) std::swap(level.kept, level.given);
    AddFrom({level.partner}, level.partner, level.given, level.kept);
    range = level.kept;
    levels.push_back(level);
  }
  for (; !levels.empty(); levels.pop_back()) {
    const Level& level = levels.back();
    const absl::Span<std::byte> into = AsWritableBytes(level.given);
    Exchange({level.partner}, level.partner, AsBytes(level.kept), into.size(),
             [&](size_t offset, absl::Span<const std::byte> bytes) {
               if (!bytes.empty()) std::memcpy(into.data() + offset, bytes.data(), bytes.size());
             });
  }
}

absl::Status GlooCommunicator::AllReduceSum(absl::Span<float> values) {
  const size_t bytes = values.size() * sizeof(float);
  return Run(kAllReduce, bytes, [&] {
    const bool power_of_two = (options_.size & (options_.size - 1)) == 0;
    if (power_of_two && options_.size > 2 && bytes >= kScatterBytes) {
      ReduceByHalving(values);
    } else {
      ReduceByDoubling(values);
    }
  });
}

absl::Status GlooCommunicator::Gather(absl::Span<const float> mine, absl::Span<float> all,
                                      int root) {
  LOCKSTEP_CHECK(root >= 0 && root < options_.size);
  const bool is_root = root == options_.rank;
  LOCKSTEP_CHECK(!is_root || all.size() == mine.size() * options_.size);
  if (is_root && !mine.empty()) {
    std::memcpy(all.data() + options_.rank * mine.size(), mine.data(), mine.size() * sizeof(float));
  }
  const size_t bytes = mine.size() * sizeof(float);
  return Run(kGather, bytes, [&] {
    if (!is_root) return SendMessage(root, AsBytes(mine));
    // Segment by segment over the ranks, so that all of them send at once.
    for (size_t i = 0; i < NumSegments(bytes); ++i) {
      for (int peer = 0; peer < options_.size; ++peer) {
        if (peer == root) continue;
        const absl::Span<const std::byte> piece = ReceiveSegment(peer, bytes, i);
        std::byte* into = AsWritableBytes(all).data() + peer * bytes + SegmentStart(bytes, i);
        if (!piece.empty()) std::memcpy(into, piece.data(), piece.size());
        mesh_.link(peer).Consumed();
      }
    }
  });
}

absl::Status GlooCommunicator::Broadcast(absl::Span<std::byte> data, int root) {
  LOCKSTEP_CHECK(root >= 0 && root < options_.size);
  return Run(kBroadcast, data.size(), [&] {
    std::vector<int> to;
    for (int peer = 0; root == options_.rank && peer < options_.size; ++peer) {
      if (peer != root) to.push_back(peer);
    }
    Exchange(to, root == options_.rank ? -1 : root, data, data.size(),
             [&](size_t offset, absl::Span<const std::byte> bytes) {
               if (!bytes.empty()) std::memcpy(data.data() + offset, bytes.data(), bytes.size());
             });
  });
}

absl::Status GlooCommunicator::Barrier() {
  return Run(kBarrier, 0, [&] { ReduceByDoubling({}); });
}

}  // namespace

std::unique_ptr<RankCommunicator> MakeGlooCommunicator(const CommunicatorOptions& options) {
  return std::make_unique<GlooCommunicator>(options);
}

std::string GlooVersion() {
  return absl::StrCat("gloo ", GLOO_VERSION_MAJOR, ".", GLOO_VERSION_MINOR, ".",
                      GLOO_VERSION_PATCH);
}

}  // namespace lockstep
