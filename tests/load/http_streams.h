// Many HTTP streams at little cost: one thread, one epoll, a raw connection an
// answer. What a reader does with what the server sends is the point:
//
//   kKeep       all of it, kept: for comparing answers
//   kDiscard    all of it, thrown away in the kernel: reading at no cost
//   kTrickle    64 bytes now and then, into a receive buffer as small as it gets
//
// The request asks as HTTP/1.0, so that an answer is what comes until the end.
#ifndef LOCKSTEP_TESTS_LOAD_HTTP_STREAMS_H_
#define LOCKSTEP_TESTS_LOAD_HTTP_STREAMS_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace lockstep {

class HttpStreams {
 public:
  enum class Reading { kKeep, kDiscard, kTrickle };
  // The whole answer, head included; "" when it was not kept. On the thread.
  using Done = std::function<void(std::string answer)>;

  HttpStreams(int port, Reading reading);
  ~HttpStreams();  // closes what still runs

  // Posts `body` to /v1/completions on a connection of its own. Any thread. False:
  // no connection.
  bool Send(const std::string& body, Done done);
  size_t open() const { return open_; }

 private:
  struct Stream {
    std::string answer;
    Done done;
  };
  void Loop();
  bool Read(int fd, Stream* stream);  // false: the answer is over

  const int port_;
  const Reading reading_;
  const int epoll_;
  std::atomic<bool> stopping_ = false;
  std::atomic<size_t> open_ = 0;
  std::mutex mutex_;
  std::unordered_map<int, Stream> streams_;  // by descriptor; guarded by mutex_
  std::thread thread_;
};

// What a kept answer says: its tokens and text joined, and whether it is whole
// (status 200, a finish reason, [DONE]).
struct HttpAnswer {
  bool whole = false;
  std::string text;
  std::vector<uint32_t> token_ids;
};
HttpAnswer ReadAnswer(const std::string& bytes);

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_LOAD_HTTP_STREAMS_H_
