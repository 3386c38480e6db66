#include "coordinator/api/http/connection.h"

#include <malloc.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/http.hpp>
#include <iterator>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/api/http/reply_bytes.h"
#include "coordinator/api/limits.h"

// GCC 12 takes the coroutine frames' own operator delete for a wrong one where it
// has inlined only one side of the pair.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"

namespace lockstep {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;
using Parser = http::request_parser<http::string_body>;

// Read while an exchange runs. A client that sends more behind an unanswered
// request is cut off: unread, it could leave without anybody noticing.
constexpr size_t kMaxPipelinedBytes = 16 * 1024;
// At a time; every open connection holds as much.
constexpr size_t kReadBytes = 4 * 1024;
constexpr size_t kBodyReadBytes = 16 * 1024;
// What so many connections held in small pieces goes back when the last has left.
constexpr size_t kCrowd = 64;
// After an early refusal the rest of the request is read away, so that the
// client sees the refusal and not a reset.
constexpr size_t kMaxLingerBytes = 32 * 1024 * 1024;
constexpr auto kLingerTime = std::chrono::seconds(2);

std::chrono::milliseconds Ms(int64_t ms) { return std::chrono::milliseconds(ms); }

// A client whose host or network is gone sends no end. What it does not acknowledge
// for `ms`, of an answer or of TCP's own questions in between, ends the connection;
// by themselves they begin after two hours and a write fails after a quarter of one.
void NoticeLoss(int socket, int64_t ms) {
  const auto set = [socket](int option, int64_t value) {
    const int number = static_cast<int>(value);
    setsockopt(socket, IPPROTO_TCP, option, &number, sizeof number);
  };
  set(TCP_USER_TIMEOUT, ms);
  set(TCP_KEEPIDLE, std::max<int64_t>(ms / 2000, 1));  // seconds
  set(TCP_KEEPINTVL, std::max<int64_t>(ms / 6000, 1));
}

// "http://host/path?query" and "/path?query" -> "/path".
std::string PathOf(std::string target) {
  if (target.starts_with("http://") || target.starts_with("https://")) {
    const size_t slash = target.find('/', target.find("://") + 3);
    target = slash == std::string::npos ? "/" : target.substr(slash);
  }
  return target.substr(0, target.find('?'));
}

std::string ToString(boost::beast::string_view view) { return {view.data(), view.size()}; }

// Whether it is beyond doubt where the body ends. What the parser does not take
// for chunked it takes for no body at all, and the body for the next request.
bool FramingIsClear(const http::request<http::string_body>& request) {
  const auto [begin, end] = request.equal_range(http::field::transfer_encoding);
  if (begin == end) return true;
  return std::next(begin) == end && request.version() >= 11 &&
         boost::beast::iequals(begin->value(), "chunked");
}

}  // namespace

// What became of reading a request.
struct Connection::Received {
  enum class Kind { kRequest, kGone, kMalformed };
  Kind kind = Kind::kGone;
  HttpRequest request;
  int status = 400;  // of a malformed one
  std::string message;
  std::optional<HttpReply> refusal;  // instead of the two
  bool keep_alive = false;
  bool http10 = false;
  bool head_only = false;

  // Of what is known when the header has come.
  void FillHead(const http::request<http::string_body>& head) {
    http10 = head.version() < 11;
    head_only = head.method() == http::verb::head;
    request.method = ToString(head.method_string());
    request.path = PathOf(ToString(head.target()));
    request.content_type = ToString(head[http::field::content_type]);
    request.request_id = ToString(head["x-request-id"]);
    request.authorization = ToString(head[http::field::authorization]);
    request.traceparent = ToString(head["traceparent"]);
    request.origin = ToString(head[http::field::origin]);
    request.wanted_headers = ToString(head[http::field::access_control_request_headers]);
  }

  void FillBody(Parser* parser) {
    kind = Received::Kind::kRequest;
    keep_alive = parser->keep_alive();
    request.body = std::move(parser->get().body());
  }

  static Received Malformed(const error_code& ec, const Parser& parser) {
    Received out;
    out.kind = Received::Kind::kMalformed;
    if (ec == http::error::header_limit) {
      out.status = 431;
      out.message = absl::StrCat("the header is above ", limits::kHttpHeaderBytes, " bytes");
    } else if (ec == http::error::body_limit) {
      out.status = 413;
      out.message = absl::StrCat("the body is above ", limits::kBodyBytes, " bytes");
    } else {
      out.message = absl::StrCat("not an HTTP/1.1 request: ", ec.message());
    }
    out.head_only = parser.is_header_done() && parser.get().method() == http::verb::head;
    return out;
  }
};

// In the list of those that a newcomer may take the place of.
class Connection::IdleMark {
 public:
  explicit IdleMark(Connection* connection) : state_(connection->state_), connection_(connection) {
    connection->idle_ = true;
    const std::lock_guard lock(state_->mutex);
    number_ = state_->times_idle++;
    state_->idle.emplace(number_, connection);
  }
  ~IdleMark() {
    connection_->idle_ = false;
    const std::lock_guard lock(state_->mutex);
    state_->idle.erase(number_);
  }
  IdleMark(const IdleMark&) = delete;
  IdleMark& operator=(const IdleMark&) = delete;

 private:
  const std::shared_ptr<ServerState> state_;
  Connection* const connection_;
  uint64_t number_;
};

Connection::Connection(tcp::socket socket, std::shared_ptr<ServerState> state,
                       std::shared_ptr<asio::ssl::context> tls)
    : socket_(std::move(socket)),
      context_(std::move(tls)),
      wake_(socket_.get_executor()),
      write_limit_(socket_.get_executor()),
      state_(std::move(state)) {
  if (context_ != nullptr) tls_.emplace(socket_, *context_);
  const std::lock_guard lock(state_->mutex);
  state_->connections.insert(this);
  state_->most_connections = std::max(state_->most_connections, state_->connections.size());
}

Connection::~Connection() {
  bool crowd_left = false;
  {
    const std::lock_guard lock(state_->mutex);
    state_->connections.erase(this);
    state_->changed.notify_all();
    if (state_->connections.empty()) {
      crowd_left = std::exchange(state_->most_connections, 0) >= kCrowd;
    }
  }
  if (crowd_left) malloc_trim(0);
}

void Connection::Start() {
  asio::co_spawn(
      socket_.get_executor(), [self = shared_from_this()] { return self->Run(); }, asio::detached);
}

void Connection::CloseSoon() {
  asio::post(socket_.get_executor(), [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->Close();
  });
}

void Connection::CloseSoonIfIdle() {
  asio::post(socket_.get_executor(), [weak = weak_from_this()] {
    const auto self = weak.lock();
    if (self && self->idle_ && self->in_.empty()) self->Close();
  });
}

asio::awaitable<void> Connection::Run() {
  error_code ignored;
  socket_.set_option(tcp::no_delay(true), ignored);
  socket_.set_option(asio::socket_base::keep_alive(true), ignored);
  NoticeLoss(socket_.native_handle(), state_->options.write_timeout_ms);
  if (!co_await Handshake()) Close();
  while (!closed_ && !state_->stopping) {
    Received received = co_await ReadRequest();
    if (received.kind == Received::Kind::kGone) break;
    if (received.kind == Received::Kind::kMalformed) {
      const HttpReply reply =
          received.refusal ? *std::move(received.refusal)
                           : state_->handler->RefuseMalformed(received.status, received.message);
      co_await Write(WholeReply(reply, {.keep_alive = false, .without_body = received.head_only}));
      co_await Linger();
      break;
    }
    const bool keep = co_await Answer(std::move(received));
    if (!keep) {
      co_await Linger();
      break;
    }
  }
  Close();
}

asio::awaitable<bool> Connection::Handshake() {
  if (!tls_) co_return true;
  LimitTime(state_->options.header_timeout_ms);
  error_code ec;
  co_await tls_->async_handshake(asio::ssl::stream_base::server,
                                 asio::redirect_error(asio::use_awaitable, ec));
  write_limit_.expires_at(Clock::time_point::max());
  co_return !ec;
}

asio::awaitable<Connection::Received> Connection::ReadRequest() {
  Received out;
  Parser parser;
  parser.header_limit(limits::kHttpHeaderBytes);
  parser.body_limit(limits::kBodyBytes);
  parser.eager(true);
  auto lease = std::make_shared<BodyLease>(state_);
  bool began = false, header_done = false;
  std::optional<IdleMark> idle(this);
  Clock::time_point deadline = Clock::now() + Ms(state_->options.idle_timeout_ms);
  for (;;) {
    if (!in_.empty() && !began) {
      began = true;
      idle.reset();
      deadline = Clock::now() + Ms(state_->options.header_timeout_ms);
    }
    while (!in_.empty() && !parser.is_done()) {
      error_code ec;
      const size_t used = parser.put(asio::buffer(in_), ec);
      in_.erase(0, used);
      if (ec == http::error::need_more) break;
      if (ec) co_return Received::Malformed(ec, parser);
      if (!lease->Resize(parser.get().body().size())) {
        out.kind = Received::Kind::kMalformed;
        out.status = 503;
        out.message = "too many large bodies at once";
        co_return out;
      }
    }
    if (parser.is_header_done() && !std::exchange(header_done, true)) {
      deadline = Clock::now() + Ms(state_->options.body_timeout_ms);
      out.FillHead(parser.get());
      // Before the body is waited for: who may not ask fills no memory.
      out.refusal = state_->handler->Screen(&out.request);
      if (out.refusal) {
        out.kind = Received::Kind::kMalformed;
        co_return out;
      }
      if (!FramingIsClear(parser.get())) {
        out.kind = Received::Kind::kMalformed;
        out.message = "Transfer-Encoding: only chunked is supported, once, in HTTP/1.1";
        co_return out;
      }
      const auto expect = parser.get().find(http::field::expect);
      if (!parser.is_done() && expect != parser.get().end() &&
          boost::beast::iequals(expect->value(), "100-continue")) {
        if (!co_await Write("HTTP/1.1 100 Continue\r\n\r\n")) co_return out;
      }
    }
    if (parser.is_done()) break;
    if (closed_ || eof_) co_return out;
    // A client that drips bytes is as late as one that sends none.
    if (Clock::now() >= deadline) {
      if (!began) co_return out;
      out.kind = Received::Kind::kMalformed;
      out.status = 408;
      out.message = header_done ? "the body took too long" : "the header took too long";
      co_return out;
    }
    StartRead(header_done ? kBodyReadBytes : kReadBytes);
    co_await Wait(deadline);
  }
  out.FillBody(&parser);
  out.request.body_lease = std::move(lease);
  co_return out;
}

asio::awaitable<bool> Connection::Answer(Received received) {
  const BusyGuard busy(state_);
  const bool keep_alive = received.keep_alive;
  const std::shared_ptr<Exchange> exchange = state_->handler->Handle(std::move(received.request));
  // Wakes are only hints: what is true is asked again.
  exchange->SetWaker([weak = weak_from_this(), executor = socket_.get_executor()] {
    asio::post(executor, [weak] {
      if (const auto self = weak.lock()) self->Wake();
    });
  });
  bool chunked = false, streaming = false;
  Clock::time_point ping = Clock::time_point::max();
  for (;;) {
    std::optional<Exchange::Part> part = exchange->Next();
    if (!part) {
      if (closed_ || (eof_ && exchange->EndsWithClient())) {
        exchange->Abandon();
        co_return false;
      }
      if (in_.size() >= kMaxPipelinedBytes) {
        exchange->Abandon();
        Close();
        co_return false;
      }
      StartRead(kReadBytes);
      co_await Wait(ping);
      if (Clock::now() < ping) continue;
      std::string bytes;
      AppendChunk(exchange->IdleBytes(), chunked, &bytes);
      ping = Clock::now() + Ms(state_->options.ping_interval_ms);
      if (co_await Write(std::move(bytes))) continue;
      exchange->Abandon();
      co_return false;
    }
    const bool keep = keep_alive && !part->close && !closed_;
    std::string bytes;
    if (part->head && part->last && !part->stream) {
      bytes = WholeReply(*part->head, {.keep_alive = keep, .without_body = received.head_only});
    } else if (part->head) {
      chunked = !received.http10;
      streaming = true;
      bytes = StreamHead(*part->head, keep && chunked, chunked);
      AppendChunk(part->head->body, chunked, &bytes);
    } else {
      AppendChunk(part->body, chunked, &bytes);
    }
    if (chunked && part->last) bytes += kLastChunk;
    if (!co_await Write(std::move(bytes))) {
      if (!part->last) exchange->Abandon();
      co_return false;
    }
    if (part->last) co_return keep && !(streaming && received.http10);
    if (streaming) ping = Clock::now() + Ms(state_->options.ping_interval_ms);
  }
}

asio::awaitable<bool> Connection::Write(std::string bytes) {
  if (closed_) co_return false;
  size_t written = 0;
  while (written < bytes.size()) {
    LimitTime(state_->options.write_timeout_ms);
    error_code ec;
    const auto rest = asio::buffer(bytes.data() + written, bytes.size() - written);
    if (tls_) {
      written +=
          co_await tls_->async_write_some(rest, asio::redirect_error(asio::use_awaitable, ec));
    } else {
      written +=
          co_await socket_.async_write_some(rest, asio::redirect_error(asio::use_awaitable, ec));
    }
    write_limit_.expires_at(Clock::time_point::max());
    if (ec || closed_) co_return false;
  }
  co_return true;
}

asio::awaitable<void> Connection::Linger() {
  error_code ignored;
  if (tls_) {
    // TLS has an end of its own. What comes after it is read away undeciphered.
    LimitTime(std::chrono::milliseconds(kLingerTime).count());
    co_await tls_->async_shutdown(asio::redirect_error(asio::use_awaitable, ignored));
    socket_.shutdown(tcp::socket::shutdown_send, ignored);
    std::vector<char> bytes(kBodyReadBytes);
    error_code ec;
    for (size_t discarded = 0; !ec && !closed_ && discarded < kMaxLingerBytes;) {
      discarded += co_await socket_.async_read_some(asio::buffer(bytes),
                                                    asio::redirect_error(asio::use_awaitable, ec));
    }
    co_return;
  }
  socket_.shutdown(tcp::socket::shutdown_send, ignored);
  const Clock::time_point deadline = Clock::now() + kLingerTime;
  size_t discarded = 0;
  while (!eof_ && !closed_ && discarded < kMaxLingerBytes && Clock::now() < deadline) {
    discarded += in_.size();
    in_.clear();
    StartRead(kBodyReadBytes);
    co_await Wait(deadline);
  }
}

void Connection::StartRead(size_t size) {
  if (reading_ || eof_ || closed_) return;
  reading_ = true;
  if (chunk_.size() != size) chunk_ = std::vector<char>(size);  // smaller ones give room back
  if (in_.empty() && in_.capacity() > kReadBytes) in_ = std::string();
  auto done = [self = shared_from_this()](const error_code& ec, size_t count) {
    self->reading_ = false;
    self->in_.append(self->chunk_.data(), count);
    if (ec) self->eof_ = true;
    self->Wake();
  };
  if (tls_) {
    tls_->async_read_some(asio::buffer(chunk_), std::move(done));
  } else {
    socket_.async_read_some(asio::buffer(chunk_), std::move(done));
  }
}

void Connection::LimitTime(int64_t ms) {
  write_limit_.expires_after(Ms(ms));
  write_limit_.async_wait([weak = weak_from_this()](const error_code& ec) {
    const auto self = weak.lock();
    if (!ec && self && Clock::now() >= self->write_limit_.expiry()) self->Close();
  });
}

void Connection::Wake() {
  woken_ = true;
  wake_.cancel();
}

asio::awaitable<void> Connection::Wait(Clock::time_point deadline) {
  if (!woken_) {
    wake_.expires_at(deadline);
    error_code ignored;
    co_await wake_.async_wait(asio::redirect_error(asio::use_awaitable, ignored));
  }
  woken_ = false;
}

void Connection::Close() {
  if (std::exchange(closed_, true)) return;
  error_code ignored;
  socket_.close(ignored);
  write_limit_.cancel();
  Wake();
}

}  // namespace lockstep
