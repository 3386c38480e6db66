// One HTTP request and its answer as plain values: what the server (Beast)
// hands to the routes and what it pulls back. No HTTP library in it.
//
//   std::shared_ptr<Exchange> exchange = handler->Handle(std::move(request));
//   exchange->SetWaker(wake);
//   while (true) { part = exchange->Next(); part ? write(*part) : wait for wake; }
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_EXCHANGE_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_EXCHANGE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace lockstep {

struct HttpRequest {
  std::string method;  // "GET"
  std::string path;    // without the query
  std::string content_type;
  std::string request_id;  // x-request-id as it came; "" when there was none
  std::string authorization, traceparent, origin;  // likewise
  std::string wanted_headers;                      // access-control-request-headers, likewise
  uint64_t cache_salt = 0;                         // of its API key, set by Screen
  std::string body;
  // Counts the body's bytes against the server's budget until dropped.
  std::shared_ptr<void> body_lease;
};

struct HttpReply {
  int status = 200;
  std::string content_type = "application/json";
  std::vector<std::pair<std::string, std::string>> headers;  // beside the usual ones
  std::string body;
};

class Exchange {
 public:
  struct Part {
    // First part only. With more to come the body's length is not known, and
    // later parts go on with it.
    std::optional<HttpReply> head;  // its body is the beginning
    std::string body;               // of later parts
    bool last = false;
    // With the head: a stream, framed as one even where this is all of it, so that
    // what a client sees does not hang on how fast the answer came.
    bool stream = false;
    bool close = false;  // the connection too
  };

  virtual ~Exchange() = default;
  // The next part, or nothing yet: then the waker will be called. Not called
  // after a last part.
  virtual std::optional<Part> Next() = 0;
  // Called from any thread, at least once after each Next that had nothing.
  virtual void SetWaker(std::function<void()> waker) = 0;
  // The client is gone; nothing is called afterwards.
  virtual void Abandon() = 0;
  // What may come between two parts of a stream to show that it lives.
  virtual std::string IdleBytes() const { return {}; }
  // Whether the end of the client's stream means that it left.
  virtual bool EndsWithClient() const { return false; }
};

// What turns requests into exchanges: the routes. Thread-safe.
class HttpHandler {
 public:
  virtual ~HttpHandler() = default;
  virtual std::shared_ptr<Exchange> Handle(HttpRequest request) = 0;
  // A refusal that needs no body, asked when the header has come; otherwise *head
  // learns who asks.
  virtual std::optional<HttpReply> Screen(HttpRequest* head) {
    (void)head;
    return {};
  }
  // The reply to what never became a request: a malformed or oversized one.
  virtual HttpReply RefuseMalformed(int status, const std::string& message) = 0;
};

// An exchange whose reply is known.
class ReadyExchange : public Exchange {
 public:
  explicit ReadyExchange(HttpReply reply) : reply_(std::move(reply)) {}
  std::optional<Part> Next() override {
    return Part{.head = std::move(reply_), .body = {}, .last = true};
  }
  void SetWaker(std::function<void()>) override {}
  void Abandon() override {}

 private:
  HttpReply reply_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_EXCHANGE_H_
