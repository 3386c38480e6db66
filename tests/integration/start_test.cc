// Starts that cannot succeed: non-zero within 10 s, one line that says what,
// where and what would work; never `ready`.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "cli/child_process.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/fakes/temp_dir.h"
#include "tests/integration/test_server.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

struct Ended {
  int code = -1;
  std::string log;
  double seconds = 0;
  // The line that says why: the daemon's own last word, not the launcher's.
  std::string LastWord() const {
    std::istringstream lines(log);
    std::string line, last;
    while (std::getline(lines, line)) {
      if (line.find("lockstep") == 0 || line.find("rank") != std::string::npos) last = line;
    }
    return last;
  }
};

class StartTest : public ::testing::Test {
 protected:
  void SetUp() override { UseBuiltPrograms(); }
  void TearDown() override {
    if (tmpdir_.has_value()) {
      setenv("TMPDIR", tmpdir_->c_str(), /*overwrite=*/1);
    } else {
      unsetenv("TMPDIR");
    }
  }

  // A copy of the demo model to spoil.
  std::string CopyOfModel() {
    const std::string copy = dir_ + "/model";
    fs::copy(DemoModel(), copy);
    return copy;
  }
  static void EditConfig(const std::string& model, const std::function<void(json&)>& edit) {
    std::ifstream in(model + "/config.json");
    json config = json::parse(in);
    edit(config);
    std::ofstream(model + "/config.json") << config.dump();
  }

  Ended Serve(std::vector<std::string> flags) {
    const std::vector<std::string> ports = {"--http-port", "0", "--grpc-port", "0"};
    flags.insert(flags.begin(), ports.begin(), ports.end());
    return Run("serve", flags);
  }

  Ended Run(const std::string& command, const std::vector<std::string>& flags) {
    std::vector<std::string> argv = {std::string(LOCKSTEP_BINARY_DIR) + "/bin/lockstep", command};
    argv.insert(argv.end(), flags.begin(), flags.end());
    ChildOptions options;
    options.log_path = dir_ + "/log";
    fs::remove(options.log_path);
    const auto begin = std::chrono::steady_clock::now();
    const absl::StatusOr<pid_t> pid = StartChild(argv, options);
    Ended ended;
    if (!pid.ok()) return ended;
    int status = 0;
    if (!Eventually([&] { return waitpid(*pid, &status, WNOHANG) == *pid; })) {
      kill(*pid, SIGKILL);
      waitpid(*pid, &status, 0);
    }
    ended.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    ended.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    std::ifstream log(options.log_path);
    ended.log.assign(std::istreambuf_iterator<char>(log), {});
    return ended;
  }

  void ExpectRefused(const Ended& ended, const std::vector<std::string>& named) {
    EXPECT_GT(ended.code, 0) << ended.log;
    EXPECT_LE(ended.seconds, 10 * kSlowdown) << ended.log;
    EXPECT_THAT(ended.log, Not(HasSubstr("\nready\n")));
    for (const std::string& word : named) EXPECT_THAT(ended.log, HasSubstr(word));
  }

  const TempDir folder_;
  const std::string dir_ = folder_.path();

 private:
  static std::optional<std::string> Tmpdir() {
    const char* const set = std::getenv("TMPDIR");
    return set == nullptr ? std::nullopt : std::optional<std::string>(set);
  }
  const std::optional<std::string> tmpdir_ = Tmpdir();
};

TEST_F(StartTest, NamesAMissingModelFlag) { ExpectRefused(Serve({}), {"--model"}); }

TEST_F(StartTest, NamesADirectoryThatIsNotThere) {
  ExpectRefused(Serve({"--model", "/no/such/model"}), {"/no/such/model"});
}

TEST_F(StartTest, NamesTheSplitsThatWork) {
  ExpectRefused(Serve({"--model", DemoModel(), "--tensor-parallel-size", "3"}), {"3", "1, 2, 4"});
}

TEST_F(StartTest, NamesAnUnknownArchitectureAndWhatIsSupported) {
  const std::string model = CopyOfModel();
  EditConfig(model, [](json& config) { config["architectures"] = {"FalconForCausalLM"}; });
  ExpectRefused(Serve({"--model", model}), {"FalconForCausalLM", "LlamaForCausalLM"});
}

TEST_F(StartTest, NamesAConfigKeyThatWouldChangeTheMaths) {
  const std::string model = CopyOfModel();
  EditConfig(model, [](json& config) {
    config["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 4.0}};
  });
  ExpectRefused(Serve({"--model", model}), {"rope_scaling", "yarn"});
}

TEST_F(StartTest, NamesATruncatedFile) {
  const std::string model = CopyOfModel();
  fs::resize_file(model + "/model.safetensors", fs::file_size(model + "/model.safetensors") / 2);
  ExpectRefused(Serve({"--model", model, "--tensor-parallel-size", "2"}), {"model.safetensors"});
}

TEST_F(StartTest, NamesAShapeThatDoesNotFit) {
  const std::string model = CopyOfModel();
  EditConfig(model, [](json& config) { config["intermediate_size"] = 512; });
  ExpectRefused(Serve({"--model", model}), {"mlp."});
}

TEST_F(StartTest, NamesAMissingTokenizer) {
  const std::string model = CopyOfModel();
  fs::remove(model + "/tokenizer.json");
  ExpectRefused(Serve({"--model", model}), {"tokenizer.json"});
}

TEST_F(StartTest, NamesABackendThisBuildLacks) {
  ExpectRefused(Serve({"--model", DemoModel(), "--backend", "cuda"}), {"cuda"});
}

TEST_F(StartTest, NamesBadValues) {
  ExpectRefused(Serve({"--model", DemoModel(), "--dtype", "int3"}), {"--dtype", "int3"});
  ExpectRefused(Serve({"--model", DemoModel(), "--max-model-len", "100000"}), {"100000", "2048"});
  ExpectRefused(Serve({"--model", DemoModel(), "--host", "0.0.0.0"}), {"--host", "--insecure"});
  ExpectRefused(Serve({"--modle", DemoModel()}), {"--modle", "--model"});
}

// More than any host or GPU has.
TEST_F(StartTest, NamesTheFlagWhereKeysAndValuesDoNotFit) {
  std::vector<std::string> named = {"--num-kv-blocks", "16777216 blocks"};
  if (OnGpus())
    named.insert(named.end(), {"needs 12", "(weights ", " were free; ", " would fit; "});
  ExpectRefused(Serve({"--model", DemoModel(), "--num-kv-blocks", "16777216", "--block-size", "256",
                       "--max-model-len", "1024"}),
                named);
}

TEST_F(StartTest, NamesAPortThatIsTaken) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  ASSERT_EQ(listen(fd, 1), 0);
  socklen_t size = sizeof(address);
  getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size);
  const std::string port = std::to_string(ntohs(address.sin_port));
  ExpectRefused(Run("serve", {"--model", DemoModel(), "--http-port", port, "--grpc-port", "0"}),
                {"--http-port", port});
  ExpectRefused(Run("serve", {"--model", DemoModel(), "--http-port", "0", "--grpc-port", port}),
                {"--grpc-port", port});
  close(fd);
}

// Its workers would dial what nobody listens at, for ever.
TEST_F(StartTest, NamesAnAddressThatWorkersCannotDial) {
  for (const char* bad : {"127.0.0.1:0", "127.0.0.1", "127.0.0.1:99999"}) {
    ExpectRefused(Serve({"--model", DemoModel(), "--worker-address", bad}),
                  {"--worker-address", bad});
  }
}

TEST_F(StartTest, NamesAPortFileThatCannotBeWrittenBeforeTheLoad) {
  const std::string missing = dir_ + "/missing/ports";
  for (const std::string& bad : {missing, dir_}) {
    const Ended ended = Serve({"--model", DemoModel(), "--port-file", bad});
    ExpectRefused(ended, {"--port-file", bad});
    EXPECT_THAT(ended.log, Not(HasSubstr("waiting for")));  // for workers
  }
}

TEST_F(StartTest, MakesNoFolderForASocketThatHasAPlace) {
  setenv("TMPDIR", (dir_ + "/missing").c_str(), /*overwrite=*/1);
  ExpectRefused(Serve({"--model", DemoModel()}), {dir_ + "/missing", "TMPDIR"});
  // With an address it comes as far as the coordinator.
  ExpectRefused(Serve({"--model", DemoModel(), "--max-model-len", "100000", "--worker-address",
                       "unix:" + dir_ + "/workers"}),
                {"--max-model-len 100000"});
}

TEST_F(StartTest, APrintedConfigurationKeepsTheWorkersOnTheirOwnSocket) {
  const std::string printed = dir_ + "/printed";
  std::ofstream(printed) << Run("serve", {"--model", DemoModel(), "--print-config"}).log;
  EXPECT_EQ(Run("serve", {"--config", printed, "--print-config"}).log,
            Run("serve", {"--model", DemoModel(), "--print-config"}).log);
  setenv("TMPDIR", dir_.c_str(), /*overwrite=*/1);
  for (const std::vector<std::string>& flags :
       std::vector<std::vector<std::string>>{{}, {"--config", printed}}) {
    const auto served = TestServer::Start(DemoModel(), 1, flags);
    ASSERT_NE(served, nullptr);
    EXPECT_THAT(served->server().Log(), HasSubstr(" at unix:" + dir_ + "/lockstep-serve-"));
  }
}

TEST_F(StartTest, ATmpdirTooDeepForASocketIsNotUsed) {
  const std::string deep = dir_ + "/" + std::string(100, 'd');
  fs::create_directory(deep);
  setenv("TMPDIR", deep.c_str(), /*overwrite=*/1);
  const auto served = TestServer::Start(DemoModel(), 1);
  ASSERT_NE(served, nullptr);
  EXPECT_THAT(served->server().Log(), HasSubstr(" at unix:/tmp/lockstep-serve-"));
}

TEST_F(StartTest, SuggestsTheCommandThatWasMeant) {
  EXPECT_THAT(Run("srve", {}).log, HasSubstr("did you mean serve?"));
  EXPECT_THAT(Run("generate", {"--max-token", "3", "x"}).log, HasSubstr("--max-tokens"));
}

TEST_F(StartTest, AClientWithoutAServerSaysWhatToStart) {
  const Ended ended = Run("generate", {"--address", "127.0.0.1:1", "hello"});
  EXPECT_EQ(ended.code, 1);
  EXPECT_THAT(ended.log, AllOf(HasSubstr("127.0.0.1:1"), HasSubstr("lockstep serve")));
}

// NaN logits fail the request that met them, with a reason; the server lives on.
TEST_F(StartTest, NanWeightsFailRequestsNotTheServer) {
  const std::string model = CopyOfModel();
  // The last tensor's last element: bfloat16 NaN.
  std::fstream file(model + "/model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
  uint64_t header_size = 0;
  file.read(reinterpret_cast<char*>(&header_size), sizeof(header_size));
  std::string header(header_size, '\0');
  file.read(header.data(), static_cast<std::streamsize>(header_size));
  const json tensors = json::parse(header);
  const uint64_t begin = tensors["model.norm.weight"]["data_offsets"][0];
  file.seekp(static_cast<std::streamoff>(8 + header_size + begin));
  const unsigned char nan[2] = {0xc0, 0x7f};
  file.write(reinterpret_cast<const char*>(nan), 2);
  file.close();
  auto served = TestServer::Start(model, 2);
  ASSERT_NE(served, nullptr);
  for (int round = 0; round < 2; ++round) {
    StreamedAnswer answer(&served->client(), LongGreedy("hello", 5));
    const absl::Status status = answer.Await();
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("NaN"));
  }
  EXPECT_TRUE(served->Info().ready());
}

}  // namespace
}  // namespace lockstep
