// A variable that nobody reads, as each program speaks of it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/variables.h"
#include "tests/fakes/shell.h"

namespace lockstep {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;
using ::testing::UnorderedElementsAreArray;

// Lines of one stream; `command` begins with variables and names a program of bin/.
std::vector<std::string> Lines(const std::string& command, const std::string& redirect) {
  std::istringstream stream(
      RunShell(absl::StrCat("PATH=", LOCKSTEP_BINARY_DIR, "/bin:$PATH; ", command, " ", redirect))
          .out);
  std::vector<std::string> lines;
  for (std::string one; std::getline(stream, one);) lines.push_back(one);
  return lines;
}

std::vector<std::string> Errors(const std::string& command) {
  return Lines(command, "2>&1 >/dev/null </dev/null");
}
std::vector<std::string> Output(const std::string& command) {
  return Lines(command, "2>/dev/null </dev/null");
}

constexpr char kMistyped[] = "LOCKSTEP_MAX_NUM_SEQ=5 ";

auto NamesBoth() {
  return AllOf(HasSubstr("environment: LOCKSTEP_MAX_NUM_SEQ: "),
               HasSubstr("did you mean LOCKSTEP_MAX_NUM_SEQS?"));
}

TEST(VariableWarningsTest, EveryProgramSaysOneLineAndGoesOn) {
  for (const char* command :
       {"lockstep serve --print-config", "lockstep-coordinator --print-config",
        "lockstep-worker --print-config"}) {
    EXPECT_THAT(Errors(absl::StrCat(kMistyped, command)), ElementsAre(NamesBoth())) << command;
  }
  EXPECT_THAT(Errors(absl::StrCat(kMistyped, "lockstep plan /nonexistent")),
              ElementsAre(NamesBoth(), HasSubstr("/nonexistent")));
  EXPECT_THAT(Output(absl::StrCat(kMistyped, "lockstep-worker --print-config")),
              Output("lockstep-worker --print-config"));
}

TEST(VariableWarningsTest, AreOfTheLogsFormat) {
  for (const char* command : {"lockstep serve", "lockstep-coordinator", "lockstep-worker"}) {
    EXPECT_THAT(Errors(absl::StrCat(kMistyped, command, " --print-config --log-format json")),
                ElementsAre(AllOf(StartsWith("{\"time\":"), HasSubstr("\"level\":\"warning\""),
                                  NamesBoth())))
        << command;
  }
}

TEST(VariableWarningsTest, AreSaidOnceByServeAndItsChildren) {
  const std::vector<std::string> lines = Errors(
      absl::StrCat(kMistyped, "lockstep serve --model /nonexistent --tensor-parallel-size 2"));
  int said = 0;
  for (const std::string& line : lines) said += line.find("MAX_NUM_SEQ:") != line.npos ? 1 : 0;
  EXPECT_EQ(said, 1);
  ASSERT_FALSE(lines.empty());
  EXPECT_THAT(lines.back(), HasSubstr("/nonexistent"));  // the reason stands last
}

TEST(VariableWarningsTest, SettingsOfAnyDaemonAreSilentInEveryOther) {
  std::string all;
  // What is not part of a printed configuration.
  std::set<std::string> read = {"LOCKSTEP_API_KEY",
                                "LOCKSTEP_CLIENT_SSL_CA_CERTS",
                                "LOCKSTEP_CLIENT_SSL_CERTFILE",
                                "LOCKSTEP_CLIENT_SSL_KEYFILE",
                                "LOCKSTEP_CLIENT_TLS",
                                "LOCKSTEP_CONFIG",
                                "LOCKSTEP_PRINT_CONFIG",
                                "LOCKSTEP_WORKER_CONFIG"};
  for (const char* daemon : {"lockstep-coordinator", "lockstep-worker"}) {
    const std::vector<std::string> settings = Output(absl::StrCat(daemon, " --print-config"));
    EXPECT_GT(settings.size(), 10u) << daemon;
    for (const std::string& setting : settings) {
      const size_t equals = setting.find(" = ");
      ASSERT_NE(equals, setting.npos) << setting;
      const std::string variable = FlagVariable(setting.substr(0, equals));
      absl::StrAppend(&all, variable, "=", setting.substr(equals + 3), " ");
      read.insert(variable);
    }
  }
  read.erase("LOCKSTEP_INJECT");  // for the command line alone
  // No more are offered to who mistyped one than there are.
  EXPECT_THAT(SettingVariables(), UnorderedElementsAreArray(read));
  for (const char* daemon : {"lockstep-coordinator", "lockstep-worker"}) {
    EXPECT_THAT(Errors(absl::StrCat(all, daemon, " --print-config")), IsEmpty());
  }
}

TEST(VariableWarningsTest, AServiceOfKubernetesIsNoSetting) {
  const std::string links =
      "LOCKSTEP_HTTP_PORT=tcp://10.0.0.1:80 LOCKSTEP_PORT=tcp://10.0.0.1:8000 "
      "LOCKSTEP_GRPC_PORT=tcp://10.0.0.1:81 LOCKSTEP_SERVICE_HOST=10.0.0.1 ";
  for (const char* command : {"lockstep serve --print-config", "lockstep-worker --print-config"}) {
    EXPECT_THAT(Errors(absl::StrCat(links, command)), IsEmpty()) << command;
    EXPECT_EQ(Output(absl::StrCat(links, command)), Output(command)) << command;
  }
}

}  // namespace
}  // namespace lockstep
