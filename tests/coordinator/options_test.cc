#include "coordinator/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/flag_sources.h"

namespace lockstep {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class OptionsTest : public ::testing::Test {
 protected:
  ~OptionsTest() override {
    for (const std::string& name : set_) unsetenv(name.c_str());
  }
  void SetVariable(const std::string& name, const std::string& value) {
    setenv(name.c_str(), value.c_str(), 1);
    set_.push_back(name);
  }
  std::string File(const std::string& text) {
    const std::string path = absl::StrCat(::testing::TempDir(), "/options-", getpid(), ".conf");
    std::ofstream(path) << text;
    return path;
  }
  absl::Status Parse(const std::vector<std::string>& args) {
    options_ = {};
    app_ = std::make_unique<CLI::App>("test");
    AddCoordinatorFlags(*app_, &options_);
    return ParseWithSources(*app_, args);
  }
  std::string Error(const std::vector<std::string>& args) {
    absl::Status status = Parse(args);
    if (status.ok()) status = ValidateOptions(options_);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message().find('\n'), absl::string_view::npos);
    return std::string(status.message());
  }

  CoordinatorOptions options_;
  std::unique_ptr<CLI::App> app_;
  std::vector<std::string> set_;
};

TEST_F(OptionsTest, DefaultsAreThoseOfTheManual) {
  ASSERT_TRUE(Parse({"--model", "m"}).ok());
  EXPECT_TRUE(ValidateOptions(options_).ok());
  EXPECT_EQ(options_.model, "m");
  EXPECT_EQ(options_.block_size, 16u);
  EXPECT_EQ(options_.host, "127.0.0.1");
  EXPECT_EQ(options_.http_port, 8000u);
  EXPECT_EQ(options_.grpc_port, 50051u);
  EXPECT_EQ(options_.drain_timeout_s, 30);
  EXPECT_EQ(options_.recovery_timeout_s, 60);
  EXPECT_TRUE(options_.enable_prefix_caching);
  EXPECT_FALSE(options_.reflection);
}

TEST_F(OptionsTest, CommandLineOverEnvironmentOverFile) {
  const std::string file = File("max-num-seqs = 1\nblock-size = 2\nmodel = \"from file\"\n");
  SetVariable("LOCKSTEP_MAX_NUM_SEQS", "5");
  SetVariable("LOCKSTEP_BLOCK_SIZE", "6");
  ASSERT_TRUE(Parse({"--config", file, "--block-size", "8"}).ok());
  EXPECT_EQ(options_.model, "from file");
  EXPECT_EQ(options_.max_num_seqs, 5u);
  EXPECT_EQ(options_.block_size, 8u);
}

TEST_F(OptionsTest, SwitchesComeFromEverySource) {
  ASSERT_TRUE(Parse({"--no-enable-prefix-caching"}).ok());
  EXPECT_FALSE(options_.enable_prefix_caching);
  SetVariable("LOCKSTEP_ENABLE_PREFIX_CACHING", "false");
  SetVariable("LOCKSTEP_REFLECTION", "true");
  ASSERT_TRUE(Parse({}).ok());
  EXPECT_FALSE(options_.enable_prefix_caching);
  EXPECT_TRUE(options_.reflection);
  ASSERT_TRUE(Parse({"--enable-prefix-caching"}).ok());
  EXPECT_TRUE(options_.enable_prefix_caching);
  const std::string file = File("enable-prefix-caching = false\ninsecure = true\n");
  unsetenv("LOCKSTEP_ENABLE_PREFIX_CACHING");
  SetVariable("LOCKSTEP_CONFIG", file);
  ASSERT_TRUE(Parse({}).ok());
  EXPECT_FALSE(options_.enable_prefix_caching);
  EXPECT_TRUE(options_.insecure);
}

TEST_F(OptionsTest, AServiceOfKubernetesIsNoValue) {
  const std::string file = File("http-port = 8080\n");
  SetVariable("LOCKSTEP_HTTP_PORT", "tcp://10.0.0.1:80");
  SetVariable("LOCKSTEP_GRPC_PORT", "50061");
  ASSERT_TRUE(Parse({"--config", file}).ok());
  EXPECT_EQ(options_.http_port, 8080u);
  EXPECT_EQ(options_.grpc_port, 50061u);
}

TEST_F(OptionsTest, AnEmptyValueIsAValue) {
  SetVariable("LOCKSTEP_QUANTIZATION", "");
  ASSERT_TRUE(Parse({"--served-model-name=", "--block-size", "8", "--port-file", ""}).ok());
  EXPECT_EQ(options_.served_model_name, "");
  EXPECT_EQ(options_.quantization, "");
  EXPECT_EQ(options_.block_size, 8u);
}

TEST_F(OptionsTest, TheKvCachesDTypeComesFromEverySource) {
  ASSERT_TRUE(Parse({"--model", "m"}).ok());
  EXPECT_EQ(options_.kv_cache_dtype, "auto");
  const std::string file = File("kv-cache-dtype = fp8\n");
  ASSERT_TRUE(Parse({"--model", "m", "--config", file}).ok());
  EXPECT_EQ(options_.kv_cache_dtype, "fp8");
  EXPECT_TRUE(ValidateOptions(options_).ok());
  SetVariable("LOCKSTEP_KV_CACHE_DTYPE", "fp8_e4m3");
  ASSERT_TRUE(Parse({"--model", "m", "--config", file}).ok());
  EXPECT_EQ(options_.kv_cache_dtype, "fp8_e4m3");
  EXPECT_TRUE(ValidateOptions(options_).ok());
}

TEST_F(OptionsTest, ASwitchIsTrueOrFalse) {
  EXPECT_EQ(Error({"--insecure="}), "--insecure '': expected true or false");
  EXPECT_THAT(Error({"--config", File("reflection =\n")}),
              AllOf(HasSubstr("--reflection ''"), HasSubstr("in --config ")));
  SetVariable("LOCKSTEP_INSECURE", "");
  EXPECT_EQ(Error({}), "--insecure '': expected true or false (LOCKSTEP_INSECURE is set)");
}

TEST_F(OptionsTest, TheLastOfARepeatedFlagWins) {
  ASSERT_TRUE(Parse({"--block-size", "4", "--block-size=8"}).ok());
  EXPECT_EQ(options_.block_size, 8u);
}

TEST_F(OptionsTest, BadInputIsOneLineThatNamesIt) {
  EXPECT_THAT(Error({"--frobnicate", "3"}), HasSubstr("--frobnicate"));
  EXPECT_EQ(Error({"--block-size", "many"}), "--block-size 'many': expected a whole number from 0");
  EXPECT_EQ(Error({"--block-size", "-1"}), "--block-size '-1': expected a whole number from 0");
  EXPECT_EQ(Error({"--drain-timeout", "soon"}), "--drain-timeout 'soon': expected a number");
  EXPECT_EQ(Error({"--model"}), "--model: expected a value");
  EXPECT_EQ(Error({"--health-port", "8000", "--model", "m"}),
            "--health-port 8000 is --http-port, too");
  EXPECT_EQ(Error({"--health-port", "50051", "--model", "m"}),
            "--health-port 50051 is --grpc-port, too");
  EXPECT_EQ(Error({"--grpc-port", "19000", "--health-port", "19002", "--model", "m"}),
            "--health-port 19002 is --admin-address, too (by default two above --grpc-port); "
            "give another --health-port or --admin-address");
  EXPECT_THAT(Error({"--http-port", "50053", "--model", "m", "--host", "0.0.0.0", "--insecure"}),
              HasSubstr("--http-port 50053 is --admin-address, too"));
  EXPECT_EQ(Error({"--admin-address", "127.0.0.1:8000", "--model", "m"}),
            "--http-port 8000 is --admin-address, too; give another --http-port or "
            "--admin-address");
  EXPECT_THAT(Error({"--http-port", "99999", "--model", "m"}),
              AllOf(HasSubstr("--http-port"), HasSubstr("65535")));
  EXPECT_THAT(Error({}), HasSubstr("--model"));
  EXPECT_THAT(Error({"--model", "m", "--backend", "tpu"}),
              AllOf(HasSubstr("tpu"), HasSubstr("cpu, cuda")));
  EXPECT_THAT(Error({"--model", "m", "--dtype", "int3"}), HasSubstr("bfloat16"));
  EXPECT_THAT(Error({"--model", "m", "--kv-cache-dtype", "int8"}),
              AllOf(HasSubstr("--kv-cache-dtype 'int8'"), HasSubstr("auto, fp8, fp8_e4m3")));
  EXPECT_THAT(Error({"--model", "m", "--tensor-parallel-size", "0"}),
              HasSubstr("--tensor-parallel-size"));
  EXPECT_THAT(Error({"--model", "m", "--gpu-memory-utilization", "1.5"}),
              HasSubstr("--gpu-memory-utilization"));
  EXPECT_THAT(Error({"--model", "m", "--gpu-memory-utilization", "nan"}),
              HasSubstr("--gpu-memory-utilization"));
  EXPECT_THAT(Error({"--model", "m", "--drain-timeout", "-1"}), HasSubstr("--drain-timeout"));
  EXPECT_THAT(Error({"--model", "m", "--log-level", "loud"}), HasSubstr("--log-level"));
  EXPECT_THAT(Error({"--model", "m", "--max-num-seqs", "64", "--max-num-batched-tokens", "8"}),
              AllOf(HasSubstr("--max-num-seqs 64"), HasSubstr("--max-num-batched-tokens 8")));
  EXPECT_THAT(Error({"--config", "/nonexistent.conf"}), HasSubstr("/nonexistent.conf"));
  EXPECT_THAT(Error({"--model", "m", "--host", "a\n\xff"}), HasSubstr("--host a\\x0a\\xff"));
}

TEST_F(OptionsTest, BadFilesAndVariablesAreNamed) {
  const std::string file = File("block-sise = 3\n");
  EXPECT_THAT(Error({"--config", file}), AllOf(HasSubstr(file), HasSubstr("block-sise")));
  SetVariable("LOCKSTEP_BLOCK_SIZE", "x");
  EXPECT_THAT(Error({"--model", "m"}), HasSubstr("LOCKSTEP_BLOCK_SIZE"));
}

TEST_F(OptionsTest, PlainTextBeyondThisHostNeedsSayingSo) {
  EXPECT_THAT(Error({"--model", "m", "--host", "0.0.0.0"}),
              AllOf(HasSubstr("--host"), HasSubstr("--insecure")));
  EXPECT_THAT(Error({"--model", "m", "--worker-address", "10.0.0.1:50052"}),
              HasSubstr("--worker-address"));
  ASSERT_TRUE(Parse({"--model", "m", "--host", "0.0.0.0", "--insecure"}).ok());
  EXPECT_TRUE(ValidateOptions(options_).ok());
  for (const char* local :
       {"127.0.0.1", "127.0.0.1:5", "localhost:5", "unix:/a/b", "[::1]:5", "::1", "[::1]"}) {
    EXPECT_TRUE(IsLocalAddress(local)) << local;
  }
  // What begins with 127. may be a name of another host.
  for (const char* far : {"0.0.0.0", "0.0.0.0:5", "example.org", "[2001:db8::1]:5", "::", "",
                          "128.0.0.1", "127.example.org", "127.example.org:5"}) {
    EXPECT_FALSE(IsLocalAddress(far)) << far;
  }
}

TEST_F(OptionsTest, WorkersDialAHostAndAPortOrASocket) {
  for (const char* bad :
       {"127.0.0.1", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:-1", "127.0.0.1:+5", "127.0.0.1:x",
        ":50052", "50052", "::1", "[]:5", "localhost", "unix-abstract:x"}) {
    EXPECT_EQ(Error({"--model", "m", "--insecure", "--worker-address", bad}),
              absl::StrCat("--worker-address ", bad,
                           ": expected HOST:PORT with a port of 0 to 65535, or unix:PATH"));
  }
  for (const char* good : {"", "127.0.0.1:0", "localhost:65535", "[::1]:50052", "unix:w", "unix:/w",
                           "unix:/127.0.0.1:0"}) {
    ASSERT_TRUE(Parse({"--model", "m", "--worker-address", good}).ok());
    EXPECT_EQ(ValidateOptions(options_), absl::OkStatus()) << good;
  }
  EXPECT_EQ(PortOf("[::1]:0"), 0);
  EXPECT_EQ(PortOf("unix:/127.0.0.1:0"), std::nullopt);
}

TEST_F(OptionsTest, PortsOfOtherAddressesAreNotTheAdminDoors) {
  for (const std::vector<std::string>& more : std::vector<std::vector<std::string>>{
           {"--admin-address", "unix:/run/admin"}, {"--host", "10.0.0.1", "--insecure"}}) {
    std::vector<std::string> args = {"--model", "m", "--http-port", "50053"};
    args.insert(args.end(), more.begin(), more.end());
    ASSERT_TRUE(Parse(args).ok());
    EXPECT_EQ(ValidateOptions(options_), absl::OkStatus());
  }
}

TEST_F(OptionsTest, HelpIsGroupedAndIsNoError) {
  const absl::Status help = Parse({"--help"});
  EXPECT_EQ(help.code(), absl::StatusCode::kNotFound);
  for (const char* part : {"Model:", "Memory:", "Requests:", "Network:", "Operations:",
                           "--tensor-parallel-size", "--drain-timeout"}) {
    EXPECT_THAT(std::string(help.message()), HasSubstr(part));
  }
}

TEST_F(OptionsTest, AValueOfAFileIsWhatItSays) {
  const std::string file = File(
      "# all of it\n\n"
      "model = /models/a#2  # not /models/a\n"
      "served-model-name = \"a \\\"b\\\" # c\"  # d\n"
      "worker-address = [::1]:50052\n"
      "admin-address = 'unix:C:\\x'\r\n"
      "insecure\n"
      "host =\n");
  ASSERT_TRUE(Parse({"--config", file}).ok());
  EXPECT_EQ(options_.model, "/models/a#2");
  EXPECT_EQ(options_.served_model_name, "a \"b\" # c");
  EXPECT_EQ(options_.worker_address, "[::1]:50052");
  EXPECT_EQ(options_.admin_address, "unix:C:\\x");
  EXPECT_TRUE(options_.insecure);
  EXPECT_EQ(options_.host, "");
  for (const char* bad : {"model = \"a", "model = \"a\" b", "model = \"a\"b", "[model]", "= a"}) {
    EXPECT_THAT(Error({"--config", File(bad)}), HasSubstr("--config ")) << bad;
  }
}

TEST_F(OptionsTest, PrintedConfigurationReadsBackAsItself) {
  ASSERT_TRUE(Parse({"--model", "some dir/m", "--no-enable-prefix-caching", "--block-size", "8",
                     "--served-model-name", "a\"b\\ [#'\n", "--gpu-memory-utilization", "0.5",
                     "--reflection"})
                  .ok());
  const std::string printed = PrintConfig(*app_);
  ASSERT_TRUE(Parse({"--config", File(printed)}).ok()) << printed;
  EXPECT_EQ(options_.model, "some dir/m");
  EXPECT_EQ(options_.served_model_name, "a\"b\\ [#'\n");
  EXPECT_FALSE(options_.enable_prefix_caching);
  EXPECT_TRUE(options_.reflection);
  EXPECT_FALSE(options_.insecure);
  EXPECT_EQ(options_.block_size, 8u);
  EXPECT_EQ(options_.gpu_memory_utilization, 0.5);
  EXPECT_EQ(PrintConfig(*app_), printed);
}

}  // namespace
}  // namespace lockstep
