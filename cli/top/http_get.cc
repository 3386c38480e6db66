#include "cli/top/http_get.h"

#include <netdb.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <memory>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

constexpr size_t kMaxAnswerBytes = 64 << 20;

class Socket {
 public:
  explicit Socket(int fd) : fd_(fd) {}
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  int fd() const { return fd_; }

 private:
  const int fd_;
};

absl::Status Away(const std::string& address, const std::string& why) {
  return absl::UnavailableError(absl::StrCat(address, ": ", why));
}

absl::StatusOr<std::pair<std::string, std::string>> SplitAddress(const std::string& address) {
  const size_t colon = address.rfind(':');
  if (colon == std::string::npos || colon + 1 == address.size() || colon == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--server ", address, ": expected host:port of the HTTP door"));
  }
  std::string host = address.substr(0, colon);
  if (host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  return std::pair(host, address.substr(colon + 1));
}

absl::StatusOr<std::unique_ptr<Socket>> Dial(const std::string& address, int64_t timeout_ms) {
  const auto parts = SplitAddress(address);
  if (!parts.ok()) return parts.status();
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int failed = getaddrinfo(parts->first.c_str(), parts->second.c_str(), &hints, &found);
  if (failed != 0) return Away(address, gai_strerror(failed));
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, freeaddrinfo);
  const timeval timeout{timeout_ms / 1000, (timeout_ms % 1000) * 1000};
  int error = 0;
  for (const addrinfo* each = found; each != nullptr; each = each->ai_next) {
    auto socket_fd = std::make_unique<Socket>(
        socket(each->ai_family, each->ai_socktype | SOCK_CLOEXEC, each->ai_protocol));
    if (socket_fd->fd() < 0) continue;
    // The send timeout bounds connect as well.
    setsockopt(socket_fd->fd(), SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
    setsockopt(socket_fd->fd(), SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
    if (connect(socket_fd->fd(), each->ai_addr, each->ai_addrlen) == 0) return socket_fd;
    error = errno;
  }
  return Away(address, strerror(error));
}

template <typename T, void (*kFree)(T*)>
struct Freer {
  void operator()(T* value) const { kFree(value); }
};

// TLS over a socket, or the socket alone.
class Stream {
 public:
  Stream(std::string address, std::unique_ptr<Socket> socket)
      : address_(std::move(address)), socket_(std::move(socket)) {}

  absl::Status StartTls(const std::string& host, const ServerAccess& access) {
    context_.reset(SSL_CTX_new(TLS_client_method()));
    SSL_CTX_set_verify(context_.get(), SSL_VERIFY_PEER, nullptr);
    const bool trusted =
        access.ca_certs.empty()
            ? SSL_CTX_set_default_verify_paths(context_.get()) == 1
            : SSL_CTX_load_verify_locations(context_.get(), access.ca_certs.c_str(), nullptr) == 1;
    if (!trusted) return TlsError("--ssl-ca-certs");
    if (!access.certificate.empty() &&
        (SSL_CTX_use_certificate_chain_file(context_.get(), access.certificate.c_str()) != 1 ||
         SSL_CTX_use_PrivateKey_file(context_.get(), access.key.c_str(), SSL_FILETYPE_PEM) != 1)) {
      return TlsError("--ssl-certfile, --ssl-keyfile");
    }
    ssl_.reset(SSL_new(context_.get()));
    // A name, or an address that the certificate must have as one.
    X509_VERIFY_PARAM* const expected = SSL_get0_param(ssl_.get());
    if (X509_VERIFY_PARAM_set1_ip_asc(expected, host.c_str()) != 1) {
      SSL_set1_host(ssl_.get(), host.c_str());
      SSL_set_tlsext_host_name(ssl_.get(), host.c_str());
    }
    ERR_clear_error();
    SSL_set_fd(ssl_.get(), socket_->fd());
    if (SSL_connect(ssl_.get()) == 1) return absl::OkStatus();
    const long verified = SSL_get_verify_result(ssl_.get());
    if (verified == X509_V_OK) return TlsError("no TLS connection");
    return Away(address_, absl::StrCat("the server's certificate: ",
                                       X509_verify_cert_error_string(verified)));
  }

  absl::Status Send(const std::string& bytes) {
    const auto size = static_cast<ssize_t>(bytes.size());
    if (ssl_ != nullptr) {
      if (SSL_write(ssl_.get(), bytes.data(), static_cast<int>(size)) == size) {
        return absl::OkStatus();
      }
      return TlsError("sending");
    }
    if (send(socket_->fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL) == size) {
      return absl::OkStatus();
    }
    return Away(address_, strerror(errno));
  }

  absl::StatusOr<std::string> ReadToEnd() {
    std::string answer;
    char buffer[16384];
    for (;;) {
      const ssize_t n = ssl_ != nullptr ? SSL_read(ssl_.get(), buffer, sizeof(buffer))
                                        : recv(socket_->fd(), buffer, sizeof(buffer), 0);
      if (n == 0) return answer;
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && errno == EAGAIN) return Away(address_, "no answer in time");
      if (n < 0) return ssl_ != nullptr ? TlsError("reading") : Away(address_, strerror(errno));
      answer.append(buffer, static_cast<size_t>(n));
      if (answer.size() > kMaxAnswerBytes) return Away(address_, "an answer without end");
    }
  }

 private:
  absl::Status TlsError(const char* what) const {
    const char* const why = ERR_reason_error_string(ERR_get_error());
    return Away(address_, absl::StrCat(what, ": ", why != nullptr ? why : "the server went away"));
  }

  const std::string address_;
  const std::unique_ptr<Socket> socket_;
  std::unique_ptr<SSL_CTX, Freer<SSL_CTX, SSL_CTX_free>> context_;
  std::unique_ptr<SSL, Freer<SSL, SSL_free>> ssl_;
};

}  // namespace

absl::StatusOr<std::string> HttpGet(const std::string& address, const ServerAccess& access,
                                    const std::string& path, int64_t timeout_ms) {
  const auto parts = SplitAddress(address);
  if (!parts.ok()) return parts.status();
  absl::StatusOr<std::unique_ptr<Socket>> socket = Dial(address, timeout_ms);
  if (!socket.ok()) return socket.status();
  Stream stream(address, *std::move(socket));
  if (access.use_tls()) {
    if (absl::Status status = stream.StartTls(parts->first, access); !status.ok()) return status;
  }
  std::string request =
      absl::StrCat("GET ", path, " HTTP/1.1\r\nHost: ", address, "\r\nConnection: close\r\n");
  if (!access.api_key.empty()) {
    absl::StrAppend(&request, "Authorization: Bearer ", access.api_key, "\r\n");
  }
  if (absl::Status sent = stream.Send(request + "\r\n"); !sent.ok()) return sent;
  absl::StatusOr<std::string> answer = stream.ReadToEnd();
  if (!answer.ok()) return answer.status();
  const size_t end = answer->find("\r\n\r\n");
  if (answer->rfind("HTTP/1.", 0) != 0 || end == std::string::npos) {
    return Away(address,
                "no plain HTTP is spoken here; give the HTTP door's port, and --tls or "
                "--ssl-ca-certs where it talks TLS");
  }
  const std::string head = absl::AsciiStrToLower(answer->substr(0, end));
  if (head.substr(8, 5) != " 200 ") {
    return Away(address, absl::StrCat(path, ": ", answer->substr(9, answer->find("\r\n") - 9)));
  }
  if (head.find("transfer-encoding: chunked") != std::string::npos) {
    return Away(address, absl::StrCat(path, ": a chunked answer, which is no Lockstep server's"));
  }
  return answer->substr(end + 4);
}

}  // namespace lockstep
