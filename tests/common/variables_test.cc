#include "common/variables.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/options.h"

namespace lockstep {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;
using ::testing::StartsWith;

std::vector<std::string> Unknown(const std::vector<std::string>& environment) {
  std::vector<const char*> pointers;
  for (const std::string& variable : environment) pointers.push_back(variable.c_str());
  pointers.push_back(nullptr);
  return UnknownVariables(pointers.data());
}

TEST(VariablesTest, NamesAMistypedOneAndTheNearest) {
  EXPECT_THAT(Unknown({"PATH=/bin", "LOCKSTEP_MAX_NUM_SEQ=4"}),
              ElementsAre("environment: LOCKSTEP_MAX_NUM_SEQ: nothing reads a variable of this "
                          "name; did you mean LOCKSTEP_MAX_NUM_SEQS?"));
  EXPECT_THAT(Unknown({"LOCKSTEP_MODLE=m"}), ElementsAre(EndsWith("mean LOCKSTEP_MODEL?")));
  EXPECT_THAT(Unknown({"LOCKSTEP_block-size=8"}),
              ElementsAre(EndsWith("mean LOCKSTEP_BLOCK_SIZE?")));
}

TEST(VariablesTest, SaysHowVariablesAreNamedWhereNothingIsNear) {
  EXPECT_THAT(Unknown({"LOCKSTEP_FROBNICATE=1"}),
              ElementsAre(AllOf(HasSubstr("LOCKSTEP_FROBNICATE"), HasSubstr("LOCKSTEP_SOME_FLAG"),
                                HasSubstr("--help"))));
}

TEST(VariablesTest, EveryFlagOfTheCoordinatorIsKnown) {
  CLI::App app("test");
  CoordinatorOptions options;
  AddCoordinatorFlags(app, &options);
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) {
      if (name == "help" || name.starts_with("no-")) continue;
      EXPECT_THAT(Unknown({absl::StrCat(FlagVariable(name), "=1")}), IsEmpty());
    }
  }
}

TEST(VariablesTest, IsSilentAboutTheRestOfTheSuite) {
  EXPECT_THAT(Unknown({"LOCKSTEP_API_KEY=k", "LOCKSTEP_CLIENT_TLS=1", "LOCKSTEP_COMM_ADDRESS=::1",
                       "LOCKSTEP_WORKER_CONFIG=f", "LOCKSTEP_SUPERVISOR_FD=4", "LOCKSTEP_CUDA=1",
                       "LOCKSTEP_KILLS=200", "LOCKSTEP_BIN=build", "LOCKSTEP_", "LOCKSTEPS=1",
                       "OTHER_LOCKSTEP_MODLE=m"}),
              IsEmpty());
}

TEST(VariablesTest, IsSilentAboutServicesOfKubernetes) {
  EXPECT_THAT(
      Unknown({"LOCKSTEP_SERVICE_HOST=10.0.0.1", "LOCKSTEP_SERVICE_PORT=8000",
               "LOCKSTEP_SERVICE_PORT_HTTP=8000", "LOCKSTEP_PORT=tcp://10.0.0.1:8000",
               "LOCKSTEP_PORT_8000_TCP=tcp://10.0.0.1:8000", "LOCKSTEP_PORT_8000_TCP_PROTO=tcp",
               "LOCKSTEP_PORT_8000_TCP_PORT=8000", "LOCKSTEP_PORT_8000_TCP_ADDR=10.0.0.1",
               "LOCKSTEP_COORDINATOR_PORT=udp://10.0.0.2:50052",
               "LOCKSTEP_COORDINATOR_SERVICE_HOST=10.0.0.2",
               "LOCKSTEP_MY_PORT_50051_SCTP_ADDR=10.0.0.2"}),
      IsEmpty());
}

TEST(VariablesTest, WhatOnlyLooksLikeAServiceIsNamed) {
  EXPECT_THAT(Unknown({"LOCKSTEP_HTP_PORT=8000"}),
              ElementsAre(EndsWith("did you mean LOCKSTEP_HTTP_PORT?")));
  EXPECT_THAT(Unknown({"LOCKSTEP_PORT_FILES=p"}), SizeIs(1));
  EXPECT_THAT(Unknown({"LOCKSTEP_PORT_80_TCPX=1"}), SizeIs(1));
  EXPECT_THAT(Unknown({"LOCKSTEP_PORT__TCP=1"}), SizeIs(1));
}

TEST(VariablesTest, ShowsNoValueAndNoControlCharacter) {
  const std::string secret = "sk-123";
  EXPECT_THAT(Unknown({absl::StrCat("LOCKSTEP_API_KEYS=", secret)}),
              ElementsAre(AllOf(EndsWith("LOCKSTEP_API_KEY?"), Not(HasSubstr(secret)))));
  EXPECT_THAT(Unknown({"LOCKSTEP_A\nB\x1b[2J=1"}),
              ElementsAre(AllOf(Not(HasSubstr("\n")), Not(HasSubstr("\x1b")))));
  EXPECT_THAT(Unknown({absl::StrCat("LOCKSTEP_", std::string(100'000, 'X'), "=1")}),
              ElementsAre(AllOf(HasSubstr("XXX..."), ::testing::SizeIs(::testing::Lt(200u)))));
}

TEST(VariablesTest, CountsWhatItDoesNotList) {
  std::vector<std::string> environment;
  for (int i = 0; i < 30; ++i) environment.push_back(absl::StrCat("LOCKSTEP_QQ", 10 + i, "=1"));
  const std::vector<std::string> lines = Unknown(environment);
  ASSERT_THAT(lines, SizeIs(kMostUnknownVariables + 1));
  EXPECT_THAT(lines.front(), HasSubstr("LOCKSTEP_QQ10"));
  EXPECT_THAT(lines.back(), AllOf(StartsWith("environment: "), HasSubstr("22 more")));
}

TEST(VariablesTest, AFlagOfSeveralWordsHasUnderscores) {
  EXPECT_EQ(FlagVariable("max-num-seqs"), "LOCKSTEP_MAX_NUM_SEQS");
  EXPECT_FALSE(IsServiceLink("LOCKSTEP_HTTP_PORT", "8000"));
  EXPECT_TRUE(IsServiceLink("LOCKSTEP_HTTP_PORT", "tcp://10.0.0.1:80"));
}

}  // namespace
}  // namespace lockstep
