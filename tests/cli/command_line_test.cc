// What the programs make of a command line that needs no server.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "tests/fakes/shell.h"

namespace lockstep {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;

// `command` names a program of bin/; what stands in front of it is the shell's. stderr alone.
Shell Errors(const std::string& command, const std::string& output = "/dev/null") {
  return RunShell(absl::StrCat("PATH=", LOCKSTEP_BINARY_DIR, "/bin:$PATH; ", command, " 2>&1 >",
                               output, " </dev/null"));
}

// CLI11 reads an empty number as 0, and the argument behind "--name=" as its value.
TEST(CommandLineTest, AnEmptyNumberIsRefused) {
  const std::string expected = " '': expected a whole number from 0";
  for (const std::string command : {"LOCKSTEP_HTTP_PORT= lockstep serve --print-config",
                                    "LOCKSTEP_HTTP_PORT= lockstep-coordinator --print-config",
                                    "lockstep serve --print-config --http-port=",
                                    "lockstep serve --print-config --http-port= --grpc-port 0",
                                    "lockstep serve --print-config --http-port ''"}) {
    const Shell shell = Errors(command);
    EXPECT_EQ(shell.code, 2) << command;
    EXPECT_THAT(shell.out, HasSubstr("--http-port" + expected)) << command;
  }
  EXPECT_THAT(Errors("LOCKSTEP_HTTP_PORT= lockstep serve").out,
              HasSubstr("(LOCKSTEP_HTTP_PORT is set)"));
  for (const std::string command :
       {"lockstep generate --max-tokens= --seed 3 x", "lockstep generate --max-tokens '' x"}) {
    const Shell shell = Errors(command);
    EXPECT_EQ(shell.code, 2) << command;
    EXPECT_EQ(shell.out, absl::StrCat("lockstep generate: --max-tokens", expected, "\n"));
  }
  // A text may be empty, and so may a number that another one takes the place of.
  EXPECT_EQ(Errors("LOCKSTEP_HTTP_PORT= lockstep serve --print-config --http-port 80 --host=").code,
            0);
}

TEST(CommandLineTest, WhatIsNotUtf8IsNamed) {
  for (const std::string said : {"PROMPT", "--stop", "--system"}) {
    const std::string bytes = "\"$(printf 'a\\377')\"";
    const Shell shell = Errors(said == "PROMPT"   ? "lockstep generate " + bytes
                               : said == "--stop" ? "lockstep generate --stop " + bytes + " x"
                                                  : "lockstep chat --system " + bytes);
    EXPECT_EQ(shell.code, 1);
    EXPECT_THAT(shell.out, EndsWith(said + ": not UTF-8\n"));
    EXPECT_THAT(shell.out, Not(HasSubstr("libprotobuf")));
  }
}

TEST(CommandLineTest, WhatStdoutDidNotTakeIsNoSuccess) {
  for (const std::string arguments : {"--help", "--version", "serve --print-config",
                                      "plan " LOCKSTEP_SOURCE_DIR "/deploy/demo/model",
                                      "plan --json " LOCKSTEP_SOURCE_DIR "/deploy/demo/model"}) {
    EXPECT_EQ(Errors("lockstep " + arguments).code, 0) << arguments;
    const Shell full = Errors("lockstep " + arguments, "/dev/full");
    EXPECT_EQ(full.code, 1) << arguments;
    EXPECT_EQ(full.out, "lockstep: stdout: writing failed\n");
  }
  // It may have found something to look at, too.
  EXPECT_THAT(Errors("lockstep doctor", "/dev/full").out, HasSubstr("stdout: writing failed"));
}

#ifndef LOCKSTEP_CUDA
TEST(CommandLineTest, ABackendThatThisBuildLacksEndsServeAtOnce) {
  const Shell shell = Errors(
      "lockstep serve --backend cuda --http-port 0 --grpc-port 0 --model " LOCKSTEP_SOURCE_DIR
      "/deploy/demo/model");
  EXPECT_EQ(shell.code, 2);
  EXPECT_THAT(shell.out, Not(HasSubstr("starting it again")));
  EXPECT_THAT(shell.out, EndsWith("(configure with -DLOCKSTEP_CUDA=ON)\n"));
}
#endif

// No packet leaves: the address is one of documentation's, and refused before a dial.
TEST(CommandLineTest, AWorkerThatMayNotDialSaysSoWithTheCodeOfABadCommandLine) {
  const Shell shell = Errors("lockstep-worker --coordinator 192.0.2.1:50052");
  EXPECT_EQ(shell.code, 2) << shell.out;
  EXPECT_THAT(shell.out, HasSubstr("is beyond this host"));
}

}  // namespace
}  // namespace lockstep
