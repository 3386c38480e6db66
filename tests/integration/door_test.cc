// Both doors of the real server under hostile and careless clients: every limit,
// clients that vanish or never read, bodies meant to fill memory. After all of
// it the same processes serve, with all blocks back.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/integration/test_server.h"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr size_t kMiB = 1024 * 1024;
// Under a sanitizer freed memory is kept from use for a while.
constexpr size_t kMostGrowth = kSlowdown == 1 ? 64 * kMiB : 2048 * kMiB;

// A connection that is written to and perhaps never read from.
class RawConnection {
 public:
  explicit RawConnection(int port) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    const int small = 4096;
    setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    open_ = connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  }
  ~RawConnection() { close(fd_); }
  RawConnection(const RawConnection&) = delete;
  RawConnection& operator=(const RawConnection&) = delete;

  bool open() const { return open_; }
  // What the socket takes without waiting; bytes written.
  size_t Push(std::string_view bytes) {
    const ssize_t n = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    return n > 0 ? static_cast<size_t>(n) : 0;
  }
  // At least `count` bytes of the answer, or all of it.
  std::string Read(size_t count) {
    std::string answer;
    char buffer[1024];
    while (answer.size() < count) {
      const ssize_t n = recv(fd_, buffer, std::min(sizeof(buffer), count - answer.size()), 0);
      if (n <= 0) break;
      answer.append(buffer, static_cast<size_t>(n));
    }
    return answer;
  }

 private:
  const int fd_;
  bool open_ = false;
};

std::string Post(const std::string& path, const std::string& body) {
  return absl::StrCat("POST ", path, " HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n",
                      "Content-Length: ", body.size(), "\r\n\r\n", body);
}

class DoorTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    served_ = TestServer::Start(DemoModel(), 2, {"--dtype", "float32"}).release();
    ASSERT_NE(served_, nullptr);
  }
  static void TearDownTestSuite() { delete served_; }
  void SetUp() override { ASSERT_NE(served_, nullptr); }

  // Nothing of what a test did may have cost anybody else.
  void TearDown() override {
    if (served_ == nullptr) return;
    EXPECT_TRUE(Eventually([] {
      return served_->Metric("lockstep_kv_blocks{state=\"active\"}") == 0 &&
             served_->Metric("lockstep_kv_blocks{state=\"pending\"}") == 0 &&
             served_->Metric("lockstep_requests{state=\"waiting\"}") == 0;
    }));
    StreamedAnswer answer(&served_->client(), LongGreedy("hello", 5));
    EXPECT_TRUE(answer.Await().ok()) << answer.Await() << served_->server().Log();
    // While the door still holds what it may of large messages it can give up a connection.
    absl::StatusOr<v1::GetModelInfoResponse> info;
    ASSERT_TRUE(Eventually([&] {
      info = served_->client().GetModelInfo();
      return info.ok();
    })) << info.status();
    EXPECT_EQ(info->epoch(), 1u) << "a worker had to be replaced";
  }

  static int port() { return served_->server().http_port(); }
  static json ErrorOf(const std::string& answer) {
    const size_t body = answer.find("\r\n\r\n");
    const json object = json::parse(answer.substr(body == std::string::npos ? 0 : body + 4),
                                    nullptr, /*allow_exceptions=*/false);
    return object.is_object() && object.contains("error") ? object["error"] : json::object();
  }
  // Kilobytes from the coordinator's status: "VmRSS" or, of the peak, "VmHWM".
  static size_t Memory(const std::string& what) {
    std::ifstream file(absl::StrCat("/proc/", served_->CoordinatorPid(), "/status"));
    for (std::string line; std::getline(file, line);) {
      if (absl::StartsWith(line, what)) {
        return static_cast<size_t>(std::stoul(line.substr(what.size() + 1))) * 1024;
      }
    }
    return 0;
  }
  static size_t OpenFiles() {
    const std::filesystem::directory_iterator files(
        absl::StrCat("/proc/", served_->CoordinatorPid(), "/fd"));
    return static_cast<size_t>(std::distance(begin(files), end(files)));
  }
  static void ForgetPeak() {
    std::ofstream(absl::StrCat("/proc/", served_->CoordinatorPid(), "/clear_refs")) << "5";
  }

  static TestServer* served_;
};

TestServer* DoorTest::served_ = nullptr;

struct Limit {
  const char* field;
  std::string at;      // JSON of the value at the limit, accepted
  std::string beyond;  // and of one beyond
  std::function<void(v1::SamplingParams*, bool beyond)> set;
};

std::string Strings(size_t count, size_t bytes) {
  return json(std::vector<std::string>(count, std::string(bytes, '~'))).dump();
}
std::string Ids(size_t count) { return json(std::vector<int>(count, 7)).dump(); }
std::string Bias(uint32_t entries, float value) {
  json bias = json::object();
  for (uint32_t i = 0; i < entries; ++i) bias[std::to_string(i)] = value;
  return bias.dump();
}

#define FLOAT_LIMIT(field, at, beyond)                                                          \
  Limit {                                                                                       \
#field, #at, #beyond,                                                                       \
        [](v1::SamplingParams * p, bool too_far) { p->set_##field(too_far ? (beyond) : (at)); } \
  }

std::vector<Limit> Limits() {
  return {
      FLOAT_LIMIT(temperature, 2.0f, 2.01f),
      FLOAT_LIMIT(temperature, 0.0f, -0.01f),
      FLOAT_LIMIT(top_p, 1.0f, 1.01f),
      FLOAT_LIMIT(top_p, 0.01f, 0.0f),
      FLOAT_LIMIT(min_p, 1.0f, 1.01f),
      FLOAT_LIMIT(min_p, 0.0f, -0.01f),
      FLOAT_LIMIT(repetition_penalty, 2.0f, 2.01f),
      FLOAT_LIMIT(repetition_penalty, 0.01f, 0.0f),
      FLOAT_LIMIT(presence_penalty, 2.0f, 2.01f),
      FLOAT_LIMIT(presence_penalty, -2.0f, -2.01f),
      FLOAT_LIMIT(frequency_penalty, 2.0f, 2.01f),
      FLOAT_LIMIT(frequency_penalty, -2.0f, -2.01f),
      {"n", "16", "17", [](auto* p, bool far) { p->set_n(far ? 17 : 16); }},
      {"n", "1", "0", [](auto* p, bool far) { p->set_n(far ? 0 : 1); }},
      {"max_tokens", "2", "100000",
       [](auto* p, bool far) { p->set_max_tokens(far ? 100'000 : 2); }},
      {"min_tokens", "2", "3", [](auto* p, bool far) { p->set_min_tokens(far ? 3 : 2); }},
      {"logprobs", "20", "21", [](auto* p, bool far) { p->set_logprobs(far ? 21 : 20); }},
      {"prompt_logprobs", "20", "21",
       [](auto* p, bool far) { p->set_prompt_logprobs(far ? 21 : 20); }},
      {"stop", Strings(16, 2), Strings(17, 2),
       [](auto* p, bool far) {
         for (int i = 0; i < (far ? 17 : 16); ++i) p->add_stop("~~");
       }},
      {"stop", Strings(1, 256), Strings(1, 257),
       [](auto* p, bool far) { p->add_stop(std::string(far ? 257 : 256, '~')); }},
      {"stop_token_ids", Ids(64), Ids(65),
       [](auto* p, bool far) {
         for (int i = 0; i < (far ? 65 : 64); ++i) p->add_stop_token_ids(7);
       }},
      {"logit_bias", Bias(3, 100), Bias(3, 100.5f),
       [](auto* p, bool far) { (*p->mutable_logit_bias())[3] = far ? 100.5f : 100; }},
      {"logit_bias", Bias(3, -100), R"({"4000000": 1})",
       [](auto* p, bool far) { (*p->mutable_logit_bias())[far ? 4'000'000 : 3] = -100; }},
  };
}

TEST_F(DoorTest, EveryLimitHoldsAtBothDoorsAlike) {
  for (const Limit& limit : Limits()) {
    for (const bool beyond : {false, true}) {
      SCOPED_TRACE(absl::StrCat(limit.field, beyond ? " beyond " : " at ", "its limit"));
      json body = {{"prompt", "hi"}, {"max_tokens", 2}};
      body[limit.field] = json::parse(beyond ? limit.beyond : limit.at, nullptr, false);
      if (body[limit.field].is_discarded()) {  // a C++ float literal
        body[limit.field] = std::stod(beyond ? limit.beyond : limit.at);
      }
      const std::string answer = HttpRequest(port(), "POST", "/v1/completions", body.dump());
      v1::GenerateRequest request;
      request.set_text("hi");
      request.mutable_sampling()->set_max_tokens(2);
      limit.set(request.mutable_sampling(), beyond);
      const absl::Status status = served_->client().Generate(request).status();
      if (beyond) {
        EXPECT_THAT(answer, StartsWith("HTTP/1.1 400"));
        EXPECT_EQ(ErrorOf(answer).value("param", ""), limit.field) << answer;
        EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
        EXPECT_THAT(std::string(status.message()), HasSubstr(limit.field));
      } else {
        EXPECT_THAT(answer, StartsWith("HTTP/1.1 200"));
        EXPECT_TRUE(status.ok()) << status;
      }
    }
  }
}

TEST_F(DoorTest, ANulByteIsNoEndOfABody) {
  const std::string body("{\"prompt\":\"hi\",\"max_tokens\":2}\0{\"n\":1}", 38);
  const std::string answer = HttpRequest(port(), "POST", "/v1/completions", body);
  EXPECT_THAT(answer, StartsWith("HTTP/1.1 400"));
  EXPECT_THAT(answer, HasSubstr("NUL"));
}

// Gone after k bytes of the answer, for every k up to several chunks: each before its end.
TEST_F(DoorTest, ClientsThatVanishAtEveryByteLeaveNothingBehind) {
  constexpr char kCancelled[] = "lockstep_requests_total{outcome=\"cancelled\"}";
  const std::string request =
      Post("/v1/completions",
           R"({"prompt":"Count","max_tokens":1500,"stream":true,"n":2,"ignore_eos":true})");
  const double before = served_->Metric(kCancelled);
  double vanished = 0;
  for (size_t bytes = 1; bytes < 1200; bytes += 13) {
    {
      RawConnection client(port());
      ASSERT_TRUE(client.open());
      ASSERT_EQ(client.Push(request), request.size());
      ASSERT_EQ(client.Read(bytes).size(), bytes);
    }
    ++vanished;
    ASSERT_TRUE(Eventually([&] { return served_->Metric(kCancelled) == before + vanished; }))
        << "after " << bytes << " bytes";
  }
}

// In the middle of its own request, too.
TEST_F(DoorTest, ClientsThatVanishWithinTheirRequestLeaveNothingBehind) {
  const std::string request =
      Post("/v1/completions", R"({"prompt":"Count","max_tokens":1500,"stream":true})");
  const size_t before = OpenFiles();
  for (size_t bytes = 0; bytes < request.size(); ++bytes) {
    RawConnection client(port());
    ASSERT_EQ(client.Push(std::string_view(request).substr(0, bytes)), bytes);
  }
  // Within a body the server would wait a minute for the rest. A few files are others'.
  EXPECT_TRUE(Eventually([&] { return OpenFiles() <= before + 8; })) << OpenFiles() - before;
}

TEST_F(DoorTest, ClientsThatNeverReadSlowNobody) {
  std::vector<std::unique_ptr<RawConnection>> deaf;
  for (int i = 0; i < 8; ++i) {
    deaf.push_back(std::make_unique<RawConnection>(port()));
    deaf.back()->Push(Post("/v1/completions",
                           R"({"prompt":"Count","max_tokens":1500,"stream":true,"logprobs":20,)"
                           R"("ignore_eos":true})"));
  }
  for (int i = 0; i < 3; ++i) {
    StreamedAnswer answer(&served_->client(), LongGreedy("hello", 100));
    EXPECT_TRUE(answer.Await().ok()) << answer.Await();
  }
}

struct Flood {
  const char* name;
  std::string bytes;
};

std::vector<Flood> Floods() {
  const std::string large(8 * kMiB - 64, 'x');
  std::string words, values = "1", chunks = "400\r\n" + std::string(1024, 'x') + "\r\n";
  while (words.size() < 7 * kMiB) words += "hello world ";
  while (values.size() < kMiB) values += ",1";
  for (int i = 0; i < 50'000; ++i) chunks += "1\r\nx\r\n";
  std::string health;
  for (int i = 0; i < 2'000; ++i) health += "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
  const std::string stream =
      Post("/v1/completions", R"({"prompt":"Count","max_tokens":1500,"stream":true,"n":4,)"
                              R"("logprobs":20,"ignore_eos":true})");
  return {
      {"half a header", "GET / HTTP/1.1\r\nX: " + std::string(15'000, 'y')},
      {"a body of 8 MiB", Post("/v1/completions", "{\"prompt\":\"" + large + "\"}")},
      {"a body in a million chunks",
       "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
       "Transfer-Encoding: chunked\r\n\r\n" +
           chunks},
      {"half a million values", Post("/v1/completions", "{\"prompt\":[" + values + "]}")},
      {"a text of 7 MiB to tokenize", Post("/tokenize", "{\"prompt\":\"" + words + "\"}")},
      {"a text of 7 MiB to complete", Post("/v1/completions", "{\"prompt\":\"" + words + "\"}")},
      {"half a million tokens to detokenize", Post("/detokenize", "{\"tokens\":[" + values + "]}")},
      {"streams that nobody reads", stream},
      {"pipelined requests behind a stream that nobody reads", stream + health},
  };
}

// 480 connections at once, each with as much of its flood as the server takes.
TEST_F(DoorTest, HostileConnectionsFillNoMemory) {
  constexpr size_t kConnections = kSlowdown == 1 ? 480 : 60;
  for (const Flood& flood : Floods()) {
    ForgetPeak();
    const size_t before = Memory("VmRSS:");
    std::vector<std::unique_ptr<RawConnection>> connections;
    std::vector<size_t> sent(kConnections);
    for (size_t i = 0; i < kConnections; ++i) {
      connections.push_back(std::make_unique<RawConnection>(port()));
    }
    // Until no socket takes more in a whole round, twice in a row.
    for (int stuck = 0; stuck < 2;) {
      bool moved = false;
      for (size_t i = 0; i < kConnections; ++i) {
        const size_t n = connections[i]->Push(std::string_view(flood.bytes).substr(sent[i]));
        sent[i] += n;
        moved = moved || n > 0;
      }
      // An answer from the server shows that it has had its turn.
      HttpRequest(port(), "GET", "/health");
      stuck = moved ? 0 : stuck + 1;
    }
    const size_t peak = std::max(Memory("VmHWM:"), before);
    RecordProperty(flood.name, static_cast<int>((peak - before) / kMiB));
    std::printf("%s: %zu MiB, then %+.0f MiB at most\n", flood.name, before / kMiB,
                static_cast<double>(peak - before) / static_cast<double>(kMiB));
    EXPECT_LE(peak, before + kMostGrowth) << flood.name;
    connections.clear();
    EXPECT_TRUE(Eventually([] {
      return served_->Metric("lockstep_kv_blocks{state=\"active\"}") == 0;
    })) << flood.name;
  }
}

// The same through the other door: large messages, many at once.
TEST_F(DoorTest, LargeGrpcMessagesFillNoMemory) {
  constexpr int kClients = 32;
  ForgetPeak();
  const size_t before = Memory("VmRSS:");
  v1::GenerateRequest request;
  while (request.text().size() < 7 * kMiB) request.mutable_text()->append("hello world ", 12);
  std::vector<std::thread> clients;
  std::vector<absl::Status> ends(kClients);
  for (int i = 0; i < kClients; ++i) {
    clients.emplace_back([&, i] {
      Client client(served_->server().address());
      ends[static_cast<size_t>(i)] = client.Generate(request).status();
    });
  }
  for (std::thread& client : clients) client.join();
  for (const absl::Status& end : ends) {
    EXPECT_TRUE(absl::IsInvalidArgument(end) || absl::IsResourceExhausted(end) ||
                absl::IsUnavailable(end))
        << end;
  }
  const size_t peak = Memory("VmHWM:");
  std::printf("large gRPC messages: %zu MiB, then %+.0f MiB at most\n", before / kMiB,
              static_cast<double>(peak - before) / static_cast<double>(kMiB));
  EXPECT_LE(peak, before + kMostGrowth);
}

}  // namespace
}  // namespace lockstep
