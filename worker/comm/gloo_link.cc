#include "worker/comm/gloo_link.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include "common/check.h"

namespace lockstep {
namespace {

constexpr std::align_val_t kAlign{64};
constexpr size_t kHeaderBytes = GlooLink::kSlotBytes - GlooLink::kSegmentBytes;
constexpr int kAckSlot = GlooLink::kWindow;
constexpr int kBreakSlot = kAckSlot + 1;
constexpr int kGreetingSlot = kAckSlot + 2;
constexpr size_t kGreetingBytes = 256 << 10;

}  // namespace

void GlooLink::Free::operator()(std::byte* p) const { ::operator delete[](p, kAlign); }

// Not cleared: pages that no segment ever touches cost nothing.
GlooLink::Block GlooLink::Allocate(size_t bytes) {
  return Block(static_cast<std::byte*>(::operator new[](bytes, kAlign)));
}

GlooLink::GlooLink(gloo::transport::Pair* pair)
    : pair_(pair),
      inbox_(Allocate(kWindow * kSlotBytes)),
      staging_(Allocate(kWindow * kSlotBytes)),
      greeting_in_(Allocate(kGreetingBytes)),
      greeting_out_(Allocate(kGreetingBytes)) {
  for (uint64_t i = 0; i < kWindow; ++i) {
    const int slot = static_cast<int>(i);
    inbox_buffers_.push_back(
        pair->createRecvBuffer(slot, inbox_.get() + i * kSlotBytes, kSlotBytes));
    staging_buffers_.push_back(
        pair->createSendBuffer(slot, staging_.get() + i * kSlotBytes, kSlotBytes));
  }
  ack_in_buffer_ = pair->createRecvBuffer(kAckSlot, &ack_in_, 1);
  ack_out_buffer_ = pair->createSendBuffer(kAckSlot, &ack_out_, 1);
  break_buffer_ = pair->createSendBuffer(kBreakSlot, &break_byte_, 1);
  greeting_in_buffer_ = pair->createRecvBuffer(kGreetingSlot, greeting_in_.get(), kGreetingBytes);
  greeting_out_buffer_ = pair->createSendBuffer(kGreetingSlot, greeting_out_.get(), kGreetingBytes);
}

void GlooLink::SendGreeting(const std::string& text) {
  LOCKSTEP_CHECK(text.size() <= 255);
  std::memset(greeting_out_.get(), 0, kGreetingBytes);
  greeting_out_[0] = static_cast<std::byte>(text.size());
  std::memcpy(greeting_out_.get() + 1, text.data(), text.size());
  greeting_out_buffer_->send(0, kGreetingBytes);
}

std::string GlooLink::ReceiveGreeting() {
  greeting_in_buffer_->waitRecv();
  greeting_out_buffer_->waitSend();
  const char* text = reinterpret_cast<const char*>(greeting_in_.get());
  std::string result(text + 1, std::to_integer<size_t>(greeting_in_[0]));
  greeting_in_buffer_.reset();
  greeting_out_buffer_.reset();
  greeting_in_.reset();
  greeting_out_.reset();
  return result;
}

void GlooLink::Send(SegmentHeader header, absl::Span<const std::byte> payload) {
  LOCKSTEP_CHECK(payload.size() <= kSegmentBytes);
  while (sent_ - acked_ >= kWindow) {
    ack_in_buffer_->waitRecv();
    acked_ += kAckEvery;
  }
  const uint64_t i = sent_ % kWindow;
  // What was sent from this staging slot a window ago has been acknowledged.
  if (sent_ >= kWindow) staging_buffers_[i]->waitSend();
  header.bytes = static_cast<uint32_t>(payload.size());
  std::byte* slot = staging_.get() + i * kSlotBytes;
  std::memcpy(slot, &header, sizeof header);
  if (!payload.empty()) std::memcpy(slot + kHeaderBytes, payload.data(), payload.size());
  ++sent_;
  staging_buffers_[i]->send(0, kHeaderBytes + payload.size());
}

GlooLink::Segment GlooLink::Receive() {
  const uint64_t i = consumed_ % kWindow;
  inbox_buffers_[i]->waitRecv();
  const std::byte* slot = inbox_.get() + i * kSlotBytes;
  Segment segment;
  std::memcpy(&segment.header, slot, sizeof segment.header);
  const size_t bytes = std::min<size_t>(segment.header.bytes, kSegmentBytes);
  segment.payload = absl::MakeConstSpan(slot + kHeaderBytes, bytes);
  return segment;
}

void GlooLink::Consumed() {
  ++consumed_;
  if (consumed_ % kAckEvery != 0) return;
  if (ack_sent_) ack_out_buffer_->waitSend();
  ack_out_buffer_->send(0, 1);
  ack_sent_ = true;
}

void GlooLink::Break() noexcept {
  // Closing a pair wakes nobody; an attempt to send on a closed pair makes gloo
  // fail every buffer that waits on it, which is what is wanted.
  try {
    pair_->close();
  } catch (const std::exception&) {
  }
  try {
    break_buffer_->send(0, 1);
  } catch (const std::exception&) {
  }
}

}  // namespace lockstep
