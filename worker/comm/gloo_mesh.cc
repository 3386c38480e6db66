#include "worker/comm/gloo_mesh.h"

#include <gloo/transport/tcp/device.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/check.h"
#include "worker/comm/local_address.h"

namespace lockstep {
namespace {

constexpr int kMaxSize = 256;
constexpr size_t kMaxIdBytes = 240;  // with a rank, a greeting

}  // namespace

GlooMesh::GlooMesh(const CommunicatorOptions& options) : options_(options) {
  LOCKSTEP_CHECK(options.size >= 1 && options.size <= kMaxSize);
  LOCKSTEP_CHECK(options.rank >= 0 && options.rank < options.size);
  LOCKSTEP_CHECK(options.id.size() <= kMaxIdBytes);
}

std::string GlooMesh::Words(const std::exception& e) {
  std::string what = e.what();
  if (!what.empty() && what.front() == '[') {
    const size_t end = what.find("] ");
    if (end != std::string::npos) what = what.substr(end + 2);
  }
  std::replace(what.begin(), what.end(), '\n', ' ');
  return what;
}

absl::Status GlooMesh::Error(absl::StatusCode code, const std::string& what) const {
  const std::string message = absl::StrCat("joining ", options_.id);
  if (aborted_) return absl::AbortedError(absl::StrCat(message, ": aborted"));
  return absl::Status(
      code, absl::StrCat(message, peer_ < 0 ? "" : absl::StrCat(", rank ", peer_), ": ", what));
}

absl::Status GlooMesh::Join(AddressExchange& exchange) {
  LOCKSTEP_CHECK(links_.empty());
  absl::Status status;
  try {
    status = CreateLinks();
    if (status.ok()) status = Connect(exchange);
    if (status.ok()) status = Greet();
  } catch (const std::exception& e) {
    status = Error(absl::StatusCode::kUnavailable,
                   absl::StrCat(Words(e), " (this rank offers ", options_.bind_address,
                                "; --comm-address chooses another)"));
  }
  if (!status.ok()) Break();
  return status;
}

absl::Status GlooMesh::CreateLinks() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (aborted_) return Error(absl::StatusCode::kAborted, "");
  absl::StatusOr<sockaddr_storage> address = ResolveLocalAddress(options_.bind_address);
  if (!address.ok()) return address.status();
  gloo::transport::tcp::attr attr;
  attr.ai_family = address->ss_family;
  attr.ai_socktype = SOCK_STREAM;
  attr.ai_protocol = 0;
  attr.ai_addr = *address;
  attr.ai_addrlen = attr.ai_family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
  device_ = std::make_shared<gloo::transport::tcp::Device>(attr);
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
absl::Status GlooMesh::Connect(AddressExchange& exchange) {
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
      return Error(absl::StatusCode::kFailedPrecondition,
                   "its addresses have another length: is it the same build?");
    }
    const size_t at = (options_.rank > peer ? options_.rank - 1 : options_.rank) * length;
    context_->getPair(peer)->connect({theirs->begin() + at, theirs->begin() + at + length});
  }
  return absl::OkStatus();
}

// Both ends say who they are, so that a stranger's connection, or one of
// another epoch, is an error.
absl::Status GlooMesh::Greet() {
  const auto greeting = [&](int rank) { return absl::StrCat(options_.id, "/", rank); };
  for (peer_ = 0; peer_ < options_.size; ++peer_) {
    if (peer_ != options_.rank) links_[peer_]->SendGreeting(greeting(options_.rank));
  }
  for (peer_ = 0; peer_ < options_.size; ++peer_) {
    if (peer_ == options_.rank) continue;
    if (links_[peer_]->ReceiveGreeting() != greeting(peer_)) {
      return Error(absl::StatusCode::kFailedPrecondition,
                   absl::StrCat("did not greet as \"", greeting(peer_), "\""));
    }
  }
  return absl::OkStatus();
}

void GlooMesh::Break() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& link : links_) {
    if (link != nullptr) link->Break();
  }
}

void GlooMesh::Abort() {
  aborted_ = true;
  Break();
}

}  // namespace lockstep
