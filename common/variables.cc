#include "common/variables.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "common/log.h"
#include "common/suggest.h"

namespace lockstep {
namespace {

constexpr std::string_view kPrefix = "LOCKSTEP_";

// Set by the process that had its say; its children have the same environment.
constexpr char kSaidVariable[] = "LOCKSTEP_VARIABLES_SAID";

// The flags of lockstep-coordinator and lockstep-worker, and the variables of the
// commands' own (cli/server_access.cc).
constexpr const char* kSettings[] = {
    "ADMIN_ADDRESS",
    "ALLOWED_ORIGINS",
    "API_KEY",
    "API_KEY_FILE",
    "BACKEND",
    "BLOCK_SIZE",
    "CLIENT_SSL_CA_CERTS",
    "CLIENT_SSL_CERTFILE",
    "CLIENT_SSL_KEYFILE",
    "CLIENT_TLS",
    "COMM_ADDRESS",
    "CONFIG",
    "COORDINATOR",
    "CPU_THREADS",
    "DEVICE",
    "DRAIN_GRACE",
    "DRAIN_TIMEOUT",
    "DTYPE",
    "ENABLE_PREFIX_CACHING",
    "EXIT_WITH_PARENT",
    "GPU_MEMORY_UTILIZATION",
    "GRPC_PORT",
    "HEALTH_PORT",
    "HOST",
    "HTTP_PORT",
    "INSECURE",
    "KV_CACHE_DTYPE",
    "LOAD_FORMAT",
    "LOG_FORMAT",
    "LOG_LEVEL",
    "MAX_MODEL_LEN",
    "MAX_NUM_BATCHED_TOKENS",
    "MAX_NUM_SEQS",
    "MAX_QUEUED_REQUESTS",
    "MODEL",
    "NUM_KV_BLOCKS",
    "PORT_FILE",
    "PREFERRED_RANK",
    "PRINT_CONFIG",
    "QUANTIZATION",
    "RECOVERY_TIMEOUT",
    "REFLECTION",
    "SERVED_MODEL_NAME",
    "SSL_CA_CERTS",
    "SSL_CERTFILE",
    "SSL_KEYFILE",
    "TENSOR_PARALLEL_SIZE",
    "THREADS",
    "WORKER_ADDRESS",
    "WORKER_CONFIG",
    "WORKER_SSL_CA_CERTS",
    "WORKER_SSL_CERTFILE",
    "WORKER_SSL_KEYFILE",
};

// Read by somebody, and nobody's setting: what processes tell their children, what the
// build and the tests read, and names that stand for a version.
constexpr const char* kOthers[] = {
    "ARCHIVES",       "BIN",           "CLIENTS",       "CLIENT_PYTHON", "CUDA",
    "FUZZ_MUTANTS",   "FUZZ_SEED",     "GOLDEN",        "GPU_LOGS",      "INJECT",
    "KILLS",          "KUBE_BIN",      "LOAD_ROUNDS",   "LOAD_SECONDS",  "LOAD_STREAMS",
    "PROGRAMS",       "PROGRESS_BARS", "SANITIZER_RUN", "SIM_SEED",      "SUPERVISOR_FD",
    "VARIABLES_SAID", "VERSION",
};

template <size_t kSize>
bool Contains(const char* const (&names)[kSize], std::string_view name) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

// "_TCP", "_UDP_PORT": what follows the number in LOCKSTEP_PORT_80_...
bool IsProtocolOfPort(std::string_view rest) {
  for (const std::string_view protocol : {"_TCP", "_UDP", "_SCTP"}) {
    for (const std::string_view part : {"", "_PROTO", "_PORT", "_ADDR"}) {
      if (rest == absl::StrCat(std::string(protocol), std::string(part))) return true;
    }
  }
  return false;
}

bool NamesPortOfService(std::string_view name) {
  constexpr std::string_view kPort = "_PORT_";
  for (size_t at = name.find(kPort); at != name.npos; at = name.find(kPort, at + 1)) {
    const std::string_view behind = name.substr(at + kPort.size());
    const size_t digits = std::min(behind.find_first_not_of("0123456789"), behind.size());
    if (digits > 0 && IsProtocolOfPort(behind.substr(digits))) return true;
  }
  return false;
}

std::string Line(std::string_view name) {
  constexpr size_t kMostBytes = 64;  // of a name that is shown
  static const std::vector<std::string> settings(std::begin(kSettings), std::end(kSettings));
  std::string line = absl::StrCat("environment: ", OneLine(name, kMostBytes),
                                  ": nothing reads a variable of this name; ");
  const std::string typed =
      absl::AsciiStrToUpper(std::string(name.substr(kPrefix.size()).substr(0, kMostBytes)));
  if (const auto near = NearestWord(typed, settings)) {
    return absl::StrCat(line, "did you mean ", std::string(kPrefix), *near, "?");
  }
  return absl::StrCat(line, "--some-flag of --help is ", std::string(kPrefix), "SOME_FLAG");
}

}  // namespace

std::string FlagVariable(std::string_view flag) {
  return absl::StrCat(std::string(kPrefix),
                      absl::AsciiStrToUpper(absl::StrReplaceAll(std::string(flag), {{"-", "_"}})));
}

std::vector<std::string> SettingVariables() {
  std::vector<std::string> variables;
  for (const char* setting : kSettings) {
    variables.push_back(absl::StrCat(std::string(kPrefix), setting));
  }
  return variables;
}

bool IsServiceLink(std::string_view name, std::string_view value) {
  const auto ends = [name](std::string_view suffix) { return name.ends_with(suffix); };
  if (ends("_SERVICE_HOST") || ends("_SERVICE_PORT")) return true;
  if (name.find("_SERVICE_PORT_") != name.npos || NamesPortOfService(name)) return true;
  if (!ends("_PORT")) return false;
  return value.starts_with("tcp://") || value.starts_with("udp://") || value.starts_with("sctp://");
}

std::vector<std::string> UnknownVariables(const char* const* environment) {
  std::vector<std::string> unknown;
  for (; *environment != nullptr; ++environment) {
    const std::string_view variable = *environment;
    if (!variable.starts_with(kPrefix)) continue;
    const size_t equals = std::min(variable.find('='), variable.size());
    const std::string_view name = variable.substr(0, equals);
    const std::string_view own = name.substr(kPrefix.size());
    if (own.empty() || Contains(kSettings, own) || Contains(kOthers, own)) continue;
    if (IsServiceLink(name, variable.substr(std::min(equals + 1, variable.size())))) continue;
    unknown.emplace_back(name);
  }
  // The order of an environment says nothing.
  std::sort(unknown.begin(), unknown.end());
  const size_t shown = std::min<size_t>(unknown.size(), kMostUnknownVariables);
  std::vector<std::string> lines;
  for (size_t i = 0; i < shown; ++i) lines.push_back(Line(unknown[i]));
  if (shown < unknown.size()) {
    lines.push_back(absl::StrCat("environment: nothing reads ", unknown.size() - shown,
                                 " more variables that begin with ", std::string(kPrefix)));
  }
  return lines;
}

std::vector<std::string> TakeUnknownVariables() {
  if (std::getenv(kSaidVariable) != nullptr) return {};
  std::vector<std::string> lines = UnknownVariables(environ);
  if (!lines.empty()) setenv(kSaidVariable, "1", /*overwrite=*/1);
  return lines;
}

}  // namespace lockstep
