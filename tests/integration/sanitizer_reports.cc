#include "tests/integration/sanitizer_reports.h"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <system_error>

#include "gtest/gtest.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

class ReportListener : public ::testing::EmptyTestEventListener {
 public:
  explicit ReportListener(std::string directory) : directory_(std::move(directory)) {}

  void OnTestEnd(const ::testing::TestInfo&) override { Collect(); }
  // What a suite's own server said at its end.
  void OnTestSuiteEnd(const ::testing::TestSuite&) override { Collect(); }
  void OnTestProgramEnd(const ::testing::UnitTest&) override {
    std::error_code ignored;
    fs::remove_all(directory_, ignored);
  }

 private:
  void Collect() {
    for (const auto& entry : fs::directory_iterator(directory_)) {
      std::ifstream file(entry.path());
      const std::string text((std::istreambuf_iterator<char>(file)), {});
      ADD_FAILURE() << "a program of this test has a sanitizer report:\n" << text;
      fs::remove(entry.path());
    }
  }

  const std::string directory_;
};

// Each runtime reads its own variable; a later flag overrides an earlier one.
void AddOption(const char* variable, const std::string& option) {
  const char* before = std::getenv(variable);
  const std::string all = before != nullptr ? std::string(before) + ":" + option : option;
  setenv(variable, all.c_str(), 1);
}

}  // namespace

void WatchForSanitizerReports() {
  static bool watching = kSlowdown == 1;
  if (watching) return;
  watching = true;
  std::string directory = ::testing::TempDir() + "/reports-XXXXXX";
  if (mkdtemp(directory.data()) == nullptr) {
    ADD_FAILURE() << "cannot make a directory for sanitizer reports: " << directory;
    return;
  }
  for (const char* variable : {"ASAN_OPTIONS", "LSAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS"}) {
    AddOption(variable, "log_path=" + directory + "/report");
  }
  AddOption("UBSAN_OPTIONS", "print_stacktrace=1");
  ::testing::UnitTest::GetInstance()->listeners().Append(new ReportListener(directory));
}

ThreadsMayLeak::ThreadsMayLeak() {
  WatchForSanitizerReports();
  const char* before = std::getenv("TSAN_OPTIONS");
  options_before_ = before != nullptr ? before : "";
  AddOption("TSAN_OPTIONS", "report_thread_leaks=0");
}

ThreadsMayLeak::~ThreadsMayLeak() { setenv("TSAN_OPTIONS", options_before_.c_str(), 1); }

}  // namespace lockstep
