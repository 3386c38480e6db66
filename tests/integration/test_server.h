// A running `lockstep serve` for tests: the real programs, on loopback, with
// ports of the kernel's choosing. Gone with the object.
#ifndef LOCKSTEP_TESTS_INTEGRATION_TEST_SERVER_H_
#define LOCKSTEP_TESTS_INTEGRATION_TEST_SERVER_H_

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cli/client.h"
#include "cli/local_server.h"
#include "gtest/gtest.h"
#include "proto/inference.pb.h"
#include "tests/integration/sanitizer_reports.h"

namespace lockstep {

// The demo model's folder and a golden model's.
std::string DemoModel();
std::string GoldenModel(const std::string& name);
// The tensor-parallel sizes of tests that split models: two, and four where LOCKSTEP_GOLDEN_MODELS
// asks for more than the cpu backend's tests do; and such a test's name.
std::vector<int> SplitSizes();
std::string SplitName(const ::testing::TestParamInfo<int>& tp_size);
// Whether the servers of this run have the cuda backend (LOCKSTEP_BACKEND).
bool OnGpus();
// LOCKSTEP_PROGRAMS for everything this test starts, whose sanitizer reports
// then fail the test.
void UseBuiltPrograms();

class TestServer {
 public:
  // Ends the server with time for what a sanitizer says at exit.
  ~TestServer();
  // Fails the current test, and returns null, when the server does not start.
  static std::unique_ptr<TestServer> Start(const std::string& model, int tp_size,
                                           std::vector<std::string> flags = {});

  Client& client() { return *client_; }
  LocalServer& server() { return *server_; }
  v1::GetModelInfoResponse Info();
  // Waits until the model is ready in an epoch above `epoch`.
  v1::GetModelInfoResponse AwaitEpochAbove(uint64_t epoch);
  pid_t WorkerPid(int rank);
  pid_t CoordinatorPid();
  // One gauge or counter of /metrics, by its whole name with labels; -1 when absent.
  double Metric(const std::string& name);

 private:
  std::unique_ptr<LocalServer> server_;
  std::unique_ptr<Client> client_;
};

// One answer, streamed on a thread of its own.
class StreamedAnswer {
 public:
  StreamedAnswer(Client* client, v1::GenerateRequest request);
  ~StreamedAnswer();
  // Tokens received so far.
  size_t size() const;
  bool done() const;
  void AwaitTokens(size_t count);
  absl::Status Await();  // the end of the stream
  void Cancel();
  // After Await:
  std::string text() const;
  std::vector<uint32_t> token_ids() const;
  int finishes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Greedy, `max_tokens` long, past the end token: a stream of known length.
v1::GenerateRequest LongGreedy(const std::string& prompt, uint32_t max_tokens);

// Asks for the condition again and again, at most `seconds` times kSlowdown.
bool Eventually(const std::function<bool()>& condition, int seconds = 20);
// GET or POST on loopback with one connection; returns the whole answer, head and body.
std::string HttpRequest(int port, const std::string& method, const std::string& path,
                        const std::string& body = "");

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_INTEGRATION_TEST_SERVER_H_
