// Runs a fuzz target where there is no libFuzzer: over the files of a corpus, so
// that what was once found stays found, and over a number of mutants of them.
// Prints how many inputs ran. The same mutants each time, unless a seed is given:
//
//   fuzz/TARGET tests/fuzz/corpus/TARGET                   300 mutants
//   LOCKSTEP_FUZZ_MUTANTS=100000 LOCKSTEP_FUZZ_SEED=7 fuzz/TARGET tests/fuzz/corpus/TARGET
//
// An input that ends the process is left in the working folder as crash-TARGET.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "tests/fuzz/fuzz_input.h"

// There when a sanitizer is.
extern "C" void __sanitizer_set_death_callback(void (*)()) __attribute__((weak));

namespace {

constexpr size_t kLargest = 4096;  // of a mutant; the longest inputs would take all the time

std::string* under_way = nullptr;  // the input of this moment
std::string crash_file;

void SaveInput() {
  if (under_way == nullptr) return;
  const int fd = open(crash_file.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return;
  (void)!write(fd, under_way->data(), under_way->size());
  close(fd);
  (void)!write(STDERR_FILENO, crash_file.data(), crash_file.size());
  (void)!write(STDERR_FILENO, " has the input\n", 15);
}

void OnAbort(int) { SaveInput(); }  // then the process ends

void Run(std::string bytes) {
  under_way = &bytes;
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  under_way = nullptr;
}

// One to four changes: a bit, a byte, a piece out, a piece of another input in.
std::string Mutant(const std::vector<std::string>& corpus, std::mt19937_64* random) {
  const auto below = [&](size_t n) { return n == 0 ? 0 : (*random)() % n; };
  std::string bytes = corpus[below(corpus.size())].substr(0, kLargest);
  for (size_t changes = 1 + below(4); changes > 0; --changes) {
    const size_t at = below(bytes.size());
    switch (below(bytes.empty() ? 1 : 4)) {
      case 0: {
        const std::string& other = corpus[below(corpus.size())];
        const size_t from = below(other.size());
        bytes.insert(at, other.substr(from, 1 + below(64)));
        break;
      }
      case 1:
        bytes.erase(at, 1 + below(16));
        break;
      case 2:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
        break;
      default:
        bytes[at] = static_cast<char>(below(256));
    }
  }
  return bytes.substr(0, kLargest);
}

size_t Setting(const char* name, size_t otherwise) {
  const char* const value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtoull(value, nullptr, 10);
}

}  // namespace

int main(int argc, char** argv) {
  namespace fs = std::filesystem;
  crash_file = "crash-" + fs::path(argv[0]).filename().string();
  struct sigaction action {};
  action.sa_handler = OnAbort;
  action.sa_flags = SA_RESETHAND;
  sigaction(SIGABRT, &action, nullptr);
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(SaveInput);

  std::vector<fs::path> files;
  size_t mutants = 0;  // of single files none: they are looked into
  for (int i = 1; i < argc; ++i) {
    if (!fs::is_directory(argv[i])) {
      files.emplace_back(argv[i]);
      continue;
    }
    mutants = Setting("LOCKSTEP_FUZZ_MUTANTS", 300);
    for (const fs::directory_entry& entry : fs::directory_iterator(argv[i])) {
      if (entry.is_regular_file()) files.push_back(entry.path());
    }
  }
  std::sort(files.begin(), files.end());
  std::vector<std::string> corpus;
  for (const fs::path& path : files) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
      std::fprintf(stderr, "%s: cannot open\n", path.c_str());
      return 2;
    }
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    std::fprintf(stderr, "%s\n", path.filename().c_str());
    Run(corpus.back());
  }
  // An empty corpus would be a test that cannot fail.
  if (files.empty()) return 2;
  std::mt19937_64 random(Setting("LOCKSTEP_FUZZ_SEED", 1));
  for (size_t i = 0; i < mutants; ++i) Run(Mutant(corpus, &random));
  std::printf("%zu inputs, %zu mutants\n", files.size(), mutants);
  return 0;
}
