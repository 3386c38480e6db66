// lockstep doctor: what this host offers, and what stands in the way.
#include <dlfcn.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <thread>

#include "CLI/CLI.hpp"
#include "cli/child_process.h"
#include "cli/commands.h"
#include "cli/doctor_links.h"
#include "cli/terminal.h"

namespace lockstep {
namespace {

class Report {
 public:
  void Good(const char* what, const std::string& found) { Line("ok", what, found); }
  void Note(const char* what, const std::string& found) { Line("--", what, found); }
  void Bad(const char* what, const std::string& found) {
    Line("!!", what, found);
    ++problems_;
  }
  int problems() const { return problems_; }

 private:
  static void Line(const char* mark, const char* what, const std::string& found) {
    std::printf("%s  %-18s %s\n", mark, what, found.c_str());
  }
  int problems_ = 0;
};

std::string FieldOf(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(key, 0) != 0) continue;
    const size_t colon = line.find(':');
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

void CheckProcessor(Report* report) {
  const std::string name = FieldOf("/proc/cpuinfo", "model name");
  const std::string flags = " " + FieldOf("/proc/cpuinfo", "flags") + " ";
  const bool avx512 = flags.find(" avx512f ") != std::string::npos;
  const bool avx2 = flags.find(" avx2 ") != std::string::npos;
  const std::string vectors = avx512 ? "AVX-512" : avx2 ? "AVX2" : "no AVX2";
  const std::string text =
      name + ", " + std::to_string(std::thread::hardware_concurrency()) + " threads, " + vectors;
  if (avx2 || avx512) {
    report->Good("processor", text);
  } else {
    report->Bad("processor", text + ": the cpu backend will be slow");
  }
}

void CheckMemory(Report* report) {
  const std::string available = FieldOf("/proc/meminfo", "MemAvailable");
  const uint64_t bytes = std::strtoull(available.c_str(), nullptr, 10) * 1024;
  report->Good("memory", HumanBytes(bytes) + " available");
}

void CheckDescriptors(Report* report) {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  // The coordinator takes as many as it may.
  const std::string text = std::to_string(limit.rlim_max) + " open files";
  if (limit.rlim_max >= 8192) {
    report->Good("descriptors", text);
  } else {
    report->Bad("descriptors", text + ": each stream takes one; `ulimit -Hn 65536` as root");
  }
}

void CheckSharedMemory(Report* report) {
  struct statvfs fs {};
  if (statvfs("/dev/shm", &fs) != 0) {
    report->Bad("/dev/shm", "missing: GPU collectives need it");
    return;
  }
  const uint64_t bytes = uint64_t{fs.f_bavail} * fs.f_frsize;
  if (bytes >= (uint64_t{64} << 20)) {
    report->Good("/dev/shm", HumanBytes(bytes) + " free");
  } else {
    report->Bad("/dev/shm", HumanBytes(bytes) + " free: GPU collectives want 64 MiB and more");
  }
}

void SayBackends(Report* report) {
#ifdef LOCKSTEP_CUDA
  report->Good("backends", "cpu and cuda");
#else
  report->Good("backends", "cpu alone: this build was configured without LOCKSTEP_CUDA");
#endif
}

void CheckDaemons(Report* report) {
  for (const char* name : {"lockstep-coordinator", "lockstep-worker"}) {
    const absl::StatusOr<std::string> path = SiblingProgram(name);
    if (path.ok()) {
      report->Good(name, *path);
    } else {
      report->Bad(name, std::string(path.status().message()));
    }
  }
}

// The driver's management library, opened the way the workers will open it.
void CheckGpus(Report* report) {
  void* nvml = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (nvml == nullptr) {
    report->Note("GPUs", "no NVIDIA driver: the cpu backend is what runs here");
    return;
  }
  auto init = reinterpret_cast<int (*)()>(dlsym(nvml, "nvmlInit_v2"));
  auto count = reinterpret_cast<int (*)(unsigned*)>(dlsym(nvml, "nvmlDeviceGetCount_v2"));
  auto shutdown = reinterpret_cast<int (*)()>(dlsym(nvml, "nvmlShutdown"));
  unsigned devices = 0;
  if (init == nullptr || count == nullptr || shutdown == nullptr || init() != 0) {
    report->Bad("GPUs", "the NVIDIA driver's library does not start");
  } else {
    if (count(&devices) == 0) {
      report->Note("GPUs", std::to_string(devices) + " found");
    }
    shutdown();
  }
  dlclose(nvml);
}

int RunDoctor() {
  Report report;
  CheckProcessor(&report);
  CheckMemory(&report);
  CheckDescriptors(&report);
  CheckSharedMemory(&report);
  CheckDaemons(&report);
  SayBackends(&report);
  CheckGpus(&report);
  if (report.problems() > 0) std::printf("%d to look at\n", report.problems());
  return report.problems() == 0 ? 0 : 1;
}

}  // namespace

void AddDoctorCommand(CLI::App* app, Command* chosen) {
  CLI::App* command = app->add_subcommand("doctor", "Say what this host offers and lacks");
  command->group("Look");
  const auto links = std::make_shared<bool>(false);
  command->add_flag("--links", *links, "Measure how the GPUs reach each other instead");
  command->callback([=] { *chosen = [=] { return *links ? RunDoctorLinks() : RunDoctor(); }; });
}

}  // namespace lockstep
