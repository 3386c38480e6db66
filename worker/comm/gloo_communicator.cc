#include "worker/comm/gloo_communicator.h"

#include <gloo/config.h>
#include <gloo/transport/context.h>
#include <gloo/transport/tcp/device.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "worker/comm/gloo_link.h"

namespace lockstep {
namespace {

using Clock = std::chrono::steady_clock;

enum Kind : uint32_t { kGreeting, kAllReduce, kGather, kBroadcast, kBarrier };
constexpr const char* kKindNames[] = {"joining", "all-reduce", "gather", "broadcast", "barrier"};

constexpr int kMaxSize = 256;
constexpr size_t kMaxIdBytes = 240;  // with a rank, a greeting
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

// What gloo says, without the place in its sources.
std::string Words(const std::exception& e) {
  std::string what = e.what();
  if (!what.empty() && what.front() == '[') {
    const size_t end = what.find("] ");
    if (end != std::string::npos) what = what.substr(end + 2);
  }
  std::replace(what.begin(), what.end(), '\n', ' ');
  return what;
}

// Thrown inside this file for a peer that breaks the protocol.
struct Mismatch : std::exception {};

absl::Span<const std::byte> AsBytes(absl::Span<const float> values) {
  return {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(float)};
}
absl::Span<std::byte> AsWritableBytes(absl::Span<float> values) {
  return {reinterpret_cast<std::byte*>(values.data()), values.size() * sizeof(float)};
}

class GlooCommunicator final : public RankCommunicator {
 public:
  explicit GlooCommunicator(const CommunicatorOptions& options) : options_(options) {
    LOCKSTEP_CHECK(options.size >= 1 && options.size <= kMaxSize);
    LOCKSTEP_CHECK(options.rank >= 0 && options.rank < options.size);
    LOCKSTEP_CHECK(options.id.size() <= kMaxIdBytes);
    if (options_.max_skew_ms <= 0) options_.max_skew_ms = kDefaultMaxSkewMs;
    struct sigaction action;
    if (sigaction(SIGPIPE, nullptr, &action) == 0 && action.sa_handler == SIG_DFL) {
      std::signal(SIGPIPE, SIG_IGN);
    }
  }

  ~GlooCommunicator() override { BreakLinks(); }

  int rank() const override { return options_.rank; }
  int size() const override { return options_.size; }
  absl::Status Join(AddressExchange& exchange) override;
  absl::Status AllReduceSum(absl::Span<float> values) override;
  absl::Status Gather(absl::Span<const float> mine, absl::Span<float> all, int root) override;
  absl::Status Broadcast(absl::Span<std::byte> data, int root) override;
  absl::Status Barrier() override;

  void Abort() override {
    aborted_ = true;
    BreakLinks();
  }

 private:
  // Runs one collective: counts, times, and turns what is thrown into a status.
  template <typename Body>
  absl::Status Run(Kind kind, size_t bytes, Body body);
  absl::Status Fail(Kind kind, const std::string& what, absl::StatusCode code);

  absl::Status CreateLinks();
  absl::Status Connect(AddressExchange& exchange);
  void Greet();
  void BreakLinks();

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

  CommunicatorOptions options_;
  std::shared_ptr<gloo::transport::Device> device_;
  std::shared_ptr<gloo::transport::Context> context_;  // after device_: destroyed first

  std::mutex mutex_;                              // guards the creation of links_ against Abort
  std::vector<std::unique_ptr<GlooLink>> links_;  // by rank; null for one's own

  std::atomic<bool> aborted_{false};
  bool joined_ = false;
  bool dead_ = false;
  uint32_t collective_ = 0;
  Kind kind_ = kGreeting;
  int peer_ = -1;         // who is being spoken to, for the message of a failure
  std::string mismatch_;  // what a Mismatch was about
  Clock::time_point blocked_since_;
};

absl::Status GlooCommunicator::Fail(Kind kind, const std::string& what, absl::StatusCode code) {
  dead_ = true;
  BreakLinks();  // the other ranks fail now instead of at their own time limit
  std::string message = absl::StrCat(kKindNames[kind], " ", collective_, " of ", options_.id);
  if (aborted_) return absl::AbortedError(absl::StrCat(message, ": aborted"));
  if (peer_ >= 0) absl::StrAppend(&message, ", rank ", peer_);
  return absl::Status(code, absl::StrCat(message, ": ", what));
}

template <typename Body>
absl::Status GlooCommunicator::Run(Kind kind, size_t bytes, Body body) {
  kind_ = kind;
  peer_ = -1;
  if (aborted_ || dead_ || (!joined_ && options_.size > 1)) {
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
    return Fail(kind, Words(e), absl::StatusCode::kUnavailable);
  }
  const uint64_t total = NanosSince(start);
  stats_.transfer_ns += total - std::min(total, stats_.wait_ns - wait_before);
  return absl::OkStatus();
}

absl::Status GlooCommunicator::Join(AddressExchange& exchange) {
  if (options_.size == 1) return absl::OkStatus();
  LOCKSTEP_CHECK(!joined_);
  blocked_since_ = Clock::now();
  absl::Status status;
  try {
    status = CreateLinks();
    if (status.ok()) status = Connect(exchange);
    if (status.ok()) Greet();
  } catch (const Mismatch&) {
    status = Fail(kGreeting, mismatch_, absl::StatusCode::kFailedPrecondition);
  } catch (const std::exception& e) {
    status = Fail(kGreeting,
                  absl::StrCat(Words(e), " (this rank offers ", options_.bind_address,
                               "; --comm-address chooses another)"),
                  absl::StatusCode::kUnavailable);
  }
  joined_ = status.ok();
  return status;
}

absl::Status GlooCommunicator::CreateLinks() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (aborted_) return absl::AbortedError(absl::StrCat("joining ", options_.id, ": aborted"));
  gloo::transport::tcp::attr attr;
  attr.hostname = options_.bind_address;
  device_ = gloo::transport::tcp::CreateDevice(attr);
  context_ = device_->createContext(options_.rank, options_.size);
  context_->setTimeout(std::chrono::milliseconds(options_.max_skew_ms));
  links_.resize(options_.size);
  for (int peer = 0; peer < options_.size; ++peer) {
    if (peer == options_.rank) continue;
    links_[peer] = std::make_unique<GlooLink>(context_->createPair(peer).get());
  }
  return absl::OkStatus();
}

// A rank publishes, under its number, the address of its end of each pair in
// rank order (its own left out), all of equal length.
absl::Status GlooCommunicator::Connect(AddressExchange& exchange) {
  std::string mine;
  for (int peer = 0; peer < options_.size; ++peer) {
    if (peer == options_.rank) continue;
    const std::vector<char> address = context_->getPair(peer)->address().bytes();
    mine.append(address.begin(), address.end());
  }
  const size_t length = mine.size() / (options_.size - 1);
  absl::Status published = exchange.Publish(absl::StrCat("rank/", options_.rank), mine);
  if (!published.ok()) return published;
  for (int peer = 0; peer < options_.size; ++peer) {
    if (peer == options_.rank) continue;
    peer_ = peer;
    absl::StatusOr<std::string> theirs = exchange.Await(absl::StrCat("rank/", peer));
    if (!theirs.ok()) return theirs.status();
    if (theirs->size() != mine.size()) {
      return Fail(kGreeting, "its addresses have another length: is it the same build?",
                  absl::StatusCode::kFailedPrecondition);
    }
    const size_t at = (options_.rank > peer ? options_.rank - 1 : options_.rank) * length;
    context_->getPair(peer)->connect({theirs->begin() + at, theirs->begin() + at + length});
  }
  return absl::OkStatus();
}

// Both ends say who they are, so that a stranger's connection, or one of
// another epoch, is an error.
void GlooCommunicator::Greet() {
  const auto greeting = [&](int rank) { return absl::StrCat(options_.id, "/", rank); };
  for (peer_ = 0; peer_ < options_.size; ++peer_) {
    if (peer_ != options_.rank) links_[peer_]->SendGreeting(greeting(options_.rank));
  }
  for (peer_ = 0; peer_ < options_.size; ++peer_) {
    if (peer_ == options_.rank) continue;
    if (links_[peer_]->ReceiveGreeting() != greeting(peer_)) {
      mismatch_ = absl::StrCat("did not greet as \"", greeting(peer_), "\"");
      throw Mismatch();
    }
  }
}

void GlooCommunicator::BreakLinks() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& link : links_) {
    if (link != nullptr) link->Break();
  }
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
  links_[to]->Send(header, message.subspan(begin, end - begin));
  stats_.bytes_sent += end - begin;
}

absl::Span<const std::byte> GlooCommunicator::ReceiveSegment(int from, size_t message_bytes,
                                                             size_t i) {
  peer_ = from;
  blocked_since_ = Clock::now();
  const GlooLink::Segment segment = links_[from]->Receive();
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
    links_[from]->Consumed();
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
        links_[peer]->Consumed();
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
