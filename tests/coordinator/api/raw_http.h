// An HTTP client of bytes: sends what a test says, however wrong, and reads
// answers strictly. Every read is bounded in time.
#ifndef LOCKSTEP_TESTS_COORDINATOR_API_RAW_HTTP_H_
#define LOCKSTEP_TESTS_COORDINATOR_API_RAW_HTTP_H_

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"

namespace lockstep {

struct RawResponse {
  int status = 0;                              // 0: the connection ended, or nothing came in time
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;                            // chunks joined
  std::vector<std::string> chunks;
  nlohmann::json json() const { return nlohmann::json::parse(body, nullptr, false); }
  // {"error": {...}}; null when it has not exactly that shape.
  nlohmann::json error() const;
};

class RawClient {
 public:
  explicit RawClient(int port);
  ~RawClient();
  RawClient(const RawClient&) = delete;
  RawClient& operator=(const RawClient&) = delete;

  bool Send(const std::string& bytes);
  RawResponse Read(bool head_only = false);
  // Until `text` has come (what came so far stays readable), the end or 20 s.
  bool WaitFor(const std::string& text);
  // Whether bytes or the end come within `timeout_ms`.
  bool Readable(int timeout_ms);
  // Everything until the server closes; nothing when it does not in time.
  std::optional<std::string> ReadToEnd();
  void ShutdownSend();
  void Close();
  // Closes with a reset instead of an orderly end.
  void Reset();

 private:
  bool Fill();
  bool ReadLine(std::string* line);

  int fd_ = -1;
  std::string buffer_;
};

// One request on a connection of its own.
RawResponse Get(int port, const std::string& path);
RawResponse Post(int port, const std::string& path, const std::string& body,
                 const std::string& headers = "Content-Type: application/json\r\n");
std::string PostBytes(const std::string& path, const std::string& body,
                      const std::string& headers = "Content-Type: application/json\r\n");

// The payloads of "data: ..." events; a body that is not a whole number of
// events gives a last element "MALFORMED".
std::vector<std::string> Events(const std::string& body);

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_COORDINATOR_API_RAW_HTTP_H_
