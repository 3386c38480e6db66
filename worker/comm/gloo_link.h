// One rank's connection to one other rank: an ordered stream of segments over a
// gloo pair.
//
// A segment is a header and up to kSegmentBytes of payload. It is written by
// one-sided sends into one of kWindow receive buffers that the peer registered
// before the connection was made, in turn, so a transfer is a single message
// without a handshake. The receiver acknowledges every kAckEvery segments that
// it has consumed; the sender never has more than kWindow unacknowledged ones,
// so no buffer is overwritten before it was read.
//
//   sender   staging[seq % kWindow] --slot seq % kWindow--> inbox[seq % kWindow]   receiver
//            acks_                  <------slot kWindow----- every kAckEvery
//
// The greeting travels in a buffer of its own, larger than any segment: gloo sizes
// a socket's send buffer by the largest message seen so far, and a connection
// that starts with small ones stalls for a delayed acknowledgement (40 ms) each
// time it must grow.
//
// Methods throw what gloo throws; GlooCommunicator catches. One thread, but
// Break, which may come from any.
#ifndef LOCKSTEP_WORKER_COMM_GLOO_LINK_H_
#define LOCKSTEP_WORKER_COMM_GLOO_LINK_H_

#include <gloo/transport/buffer.h>
#include <gloo/transport/pair.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"

namespace lockstep {

struct SegmentHeader {
  uint32_t collective = 0;   // counts the group's collectives from 1
  uint32_t kind = 0;         // of the collective
  uint32_t total_bytes = 0;  // of the whole message, over all its segments
  uint32_t bytes = 0;        // of this segment's payload
};

class GlooLink {
 public:
  static constexpr size_t kSegmentBytes = 128 << 10;
  static constexpr uint64_t kWindow = 16;
  static constexpr uint64_t kAckEvery = 8;
  // The header takes a whole cache line, so that payloads stay aligned.
  static constexpr size_t kSlotBytes = 64 + kSegmentBytes;
  // What a link holds once it has greeted: a window each way.
  static constexpr size_t kBufferBytes = 2 * kWindow * kSlotBytes;

  // Registers the receive buffers: call before the pair connects. `pair`
  // outlives the link; break it before destroying the link.
  explicit GlooLink(gloo::transport::Pair* pair);

  // Once, by both ends, before anything else. At most 255 bytes.
  void SendGreeting(const std::string& text);
  std::string ReceiveGreeting();

  // payload.size() <= kSegmentBytes. Copies, so `payload` is free on return.
  void Send(SegmentHeader header, absl::Span<const std::byte> payload);

  // The next segment; the payload is valid until Consumed().
  struct Segment {
    SegmentHeader header;
    absl::Span<const std::byte> payload;
  };
  Segment Receive();
  void Consumed();

  // Closes the connection; a call under way and all later ones throw, here and
  // at the peer. Idempotent, never throws.
  void Break() noexcept;

 private:
  struct Free {
    void operator()(std::byte* p) const;
  };
  using Block = std::unique_ptr<std::byte[], Free>;
  using Buffer = std::unique_ptr<gloo::transport::Buffer>;

  static Block Allocate(size_t bytes);

  gloo::transport::Pair* const pair_;
  Block inbox_, staging_;
  Block greeting_in_, greeting_out_;
  std::byte ack_in_{}, ack_out_{}, break_byte_{};
  uint64_t sent_ = 0, acked_ = 0, consumed_ = 0;
  bool ack_sent_ = false;
  // Last: destroyed before the memory they speak of.
  std::vector<Buffer> inbox_buffers_, staging_buffers_;
  Buffer ack_in_buffer_, ack_out_buffer_, break_buffer_;
  Buffer greeting_in_buffer_, greeting_out_buffer_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_COMM_GLOO_LINK_H_
