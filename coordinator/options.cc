#include "coordinator/options.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <set>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "common/log.h"

namespace lockstep {
namespace {

absl::Status Bad(std::string_view message) {
  return absl::InvalidArgumentError(std::string(message));
}

// "--max-model-len" of an option that has that long name.
std::string LongName(const CLI::Option& option) {
  return option.get_lnames().empty() ? "" : option.get_lnames().front();
}

std::string Variable(std::string_view name) {
  return absl::StrCat("LOCKSTEP_",
                      absl::AsciiStrToUpper(absl::StrReplaceAll(std::string(name), {{"-", "_"}})));
}

// The value of --config among `args`, or of its variable.
std::string ConfigPath(const std::vector<std::string>& args) {
  std::string path;
  if (const char* value = std::getenv("LOCKSTEP_CONFIG")) path = value;
  for (size_t i = 0; i < args.size(); ++i) {
    if (args[i] == "--config" && i + 1 < args.size()) path = args[i + 1];
    if (absl::StartsWith(args[i], "--config=")) path = args[i].substr(9);
  }
  return path;
}

// CLI11 takes the argument after "--name=" for an empty value; apart, it is one.
void Append(std::string_view name, const std::string& value, std::vector<std::string>* args) {
  if (value.empty()) {
    args->push_back(absl::StrCat("--", std::string(name)));
    args->push_back("");
  } else {
    args->push_back(absl::StrCat("--", std::string(name), "=", value));
  }
}

absl::Status AppendFile(const CLI::App& app, const std::string& path,
                        std::vector<std::string>* args) {
  if (!std::filesystem::is_regular_file(path)) {
    return Bad(absl::StrCat("--config ", path, ": no such file"));
  }
  std::vector<CLI::ConfigItem> items;
  try {
    items = app.get_config_formatter()->from_file(path);
  } catch (const std::exception& e) {
    return Bad(absl::StrCat("--config ", path, ": ", e.what()));
  }
  for (const CLI::ConfigItem& item : items) {
    const CLI::Option* option = app.get_option_no_throw(absl::StrCat("--", item.name));
    if (option == nullptr || !item.parents.empty() || item.name == "config") {
      return Bad(absl::StrCat("--config ", path, ": unknown key '", item.fullname(),
                              "': keys are flag names without dashes"));
    }
    if (item.inputs.size() != 1) {
      return Bad(absl::StrCat("--config ", path, ": ", item.name, ": expected one value"));
    }
    Append(item.name, item.inputs.front(), args);
  }
  return absl::OkStatus();
}

// CLI11 throws; its message may have several lines and does not always name
// the flag first.
std::string OneLine(const std::string& text) {
  const std::string line = text.substr(0, text.find('\n'));
  return line.empty() ? "bad command line" : line;
}

bool IsOneOf(const std::string& value, std::initializer_list<const char*> allowed) {
  return std::find(allowed.begin(), allowed.end(), value) != allowed.end();
}

absl::Status CheckChoice(const char* flag, const std::string& value,
                         std::initializer_list<const char*> allowed) {
  if (IsOneOf(value, allowed)) return absl::OkStatus();
  return Bad(absl::StrCat(flag, " '", value, "': expected one of ", absl::StrJoin(allowed, ", ")));
}

absl::Status CheckRange(const char* flag, uint64_t value, uint64_t low, uint64_t high,
                        const char* unit) {
  if (value >= low && value <= high) return absl::OkStatus();
  return Bad(absl::StrCat(flag, " ", value, ": expected ", low, " to ", high, unit));
}

}  // namespace

void AddCoordinatorFlags(CLI::App& app, CoordinatorOptions* o) {
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  const auto flag = [&app](const char* name, bool* value, const char* help, const char* group) {
    app.add_flag(name, *value, help)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeLast)
        ->group(group);
  };
  const auto option = [&app](const char* name, auto* value, const char* help, const char* group) {
    app.add_option(name, *value, help)->capture_default_str()->group(group);
  };
  const char* g = "Model";
  option("--model", &o->model, "Hugging Face model directory", g);
  option("--served-model-name", &o->served_model_name,
         "Name in the APIs; default: the directory's name", g);
  option("--backend", &o->backend, "cpu or cuda", g);
  option("--tensor-parallel-size", &o->tensor_parallel_size, "Workers the weights are split over",
         g);
  option("--dtype", &o->dtype, "auto (the checkpoint's), float32, bfloat16 or float16", g);
  option("--load-format", &o->load_format, "auto, or dummy: random weights from config.json", g);
  option("--quantization", &o->quantization, "fp8; default: as the checkpoint", g);
  option("--max-model-len", &o->max_model_len,
         "Tokens of a prompt and its answer; 0: the smaller of 8192 and the model's", g);
  g = "Memory";
  option("--block-size", &o->block_size, "Tokens a KV block", g);
  option("--num-kv-blocks", &o->num_kv_blocks, "KV blocks a rank; 0: as memory allows", g);
  option("--gpu-memory-utilization", &o->gpu_memory_utilization,
         "Share of each GPU's memory to use", g);
  flag("--enable-prefix-caching,!--no-enable-prefix-caching", &o->enable_prefix_caching,
       "Keep the KV of prompts that may come again (default on)", g);
  option("--cpu-threads", &o->cpu_threads,
         "Compute threads a rank; 0: the host's processors over its ranks", g);
  g = "Requests";
  option("--max-num-seqs", &o->max_num_seqs,
         "Sequences that run at once; 0: what fits at a quarter of --max-model-len, at most 64 "
         "(cpu) or 256 (cuda)",
         g);
  option("--max-num-batched-tokens", &o->max_num_batched_tokens,
         "Tokens a step; 0: 2048 (cpu) or 8192 (cuda)", g);
  option("--max-queued-requests", &o->max_queued_requests,
         "Requests that may wait; 0: 4 x --max-num-seqs, at least 64", g);
  g = "Network";
  option("--host", &o->host, "Address of the HTTP and gRPC doors", g);
  option("--http-port", &o->http_port, "0: any free port", g);
  option("--grpc-port", &o->grpc_port, "0: any free port", g);
  option("--worker-address", &o->worker_address,
         "Where workers dial in: HOST:PORT (port 0: any) or unix:PATH", g);
  flag("--insecure", &o->insecure, "Serve in plain text beyond loopback", g);
  flag("--reflection", &o->reflection, "gRPC server reflection", g);
  option("--port-file", &o->port_file, "JSON file with the ports, written once ready", g);
  g = "Operations";
  option("--drain-timeout", &o->drain_timeout_s, "Seconds that running requests get at SIGTERM", g);
  option("--recovery-timeout", &o->recovery_timeout_s,
         "Seconds that requests wait for a broken group", g);
  option("--log-format", &o->log_format, "text or json", g);
  option("--log-level", &o->log_level, "debug, info, warning or error", g);
  flag("--exit-with-parent", &o->exit_with_parent, "End when the parent process ends", g);
  flag("--print-config", &o->print_config, "Print the resulting configuration and exit", g);
  option("--config", &o->config, "File of flags: key = value lines", g);
}

absl::Status ParseWithSources(CLI::App& app, const std::vector<std::string>& args) {
  // One command line, lowest precedence first; the last value of a flag wins.
  std::vector<std::string> all;
  const std::string path = ConfigPath(args);
  if (!path.empty()) {
    if (absl::Status read = AppendFile(app, path, &all); !read.ok()) return read;
  }
  std::set<std::string> from_environment;
  for (const CLI::Option* option : std::as_const(app).get_options()) {
    const std::string name = LongName(*option);
    if (name.empty() || name == "help" || name == "version" || name == "config") continue;
    if (const char* value = std::getenv(Variable(name).c_str())) {
      Append(name, value, &all);
      from_environment.insert(name);
    }
  }
  const size_t num_inherited = all.size();
  for (const std::string& arg : args) {
    if (absl::StartsWith(arg, "--") && arg.find('=') == arg.size() - 1) {
      Append(std::string_view(arg).substr(2, arg.size() - 3), "", &all);
    } else {
      all.push_back(arg);
    }
  }
  std::vector<std::string> reversed(all.rbegin(), all.rend());  // as CLI11 wants it
  try {
    app.parse(reversed);
  } catch (const CLI::CallForHelp&) {
    return absl::NotFoundError(app.help());
  } catch (const CLI::CallForVersion& e) {
    return absl::NotFoundError(absl::StrCat(e.what(), "\n"));
  } catch (const CLI::ExtrasError&) {
    return Bad(absl::StrCat("unknown argument ", absl::StrJoin(app.remaining(), " "),
                            ": --help lists what there is"));
  } catch (const CLI::ParseError& e) {
    std::string line = OneLine(e.what());
    for (const std::string& name : from_environment) {
      if (absl::StrContains(line, absl::StrCat("--", name))) {
        absl::StrAppend(&line, " (", Variable(name), " is set)");
      }
    }
    if (!path.empty() && num_inherited > from_environment.size()) {
      absl::StrAppend(&line, " (with --config ", path, ")");
    }
    return Bad(line);
  }
  return absl::OkStatus();
}

absl::Status ValidateOptions(const CoordinatorOptions& o) {
  if (o.model.empty()) return Bad("--model: a model directory is needed");
  const absl::Status checks[] = {
      CheckChoice("--backend", o.backend, {"cpu", "cuda"}),
      CheckChoice("--dtype", o.dtype, {"auto", "float32", "bfloat16", "float16"}),
      CheckChoice("--load-format", o.load_format, {"auto", "dummy"}),
      CheckChoice("--quantization", o.quantization, {"", "fp8"}),
      CheckChoice("--log-format", o.log_format, {"text", "json"}),
      CheckRange("--tensor-parallel-size", o.tensor_parallel_size, 1, 64, " workers"),
      CheckRange("--block-size", o.block_size, 1, 1024, " tokens"),
      CheckRange("--num-kv-blocks", o.num_kv_blocks, 0, 1u << 24, " blocks"),
      CheckRange("--max-num-seqs", o.max_num_seqs, 0, 65'536, " sequences"),
      CheckRange("--max-model-len", o.max_model_len, 0, 1u << 22, " tokens"),
      CheckRange("--max-num-batched-tokens", o.max_num_batched_tokens, 0, 1u << 20, " tokens"),
      CheckRange("--max-queued-requests", o.max_queued_requests, 0, 1u << 20, " requests"),
      CheckRange("--cpu-threads", o.cpu_threads, 0, 1'024, " threads"),
      CheckRange("--http-port", o.http_port, 0, 65'535, ""),
      CheckRange("--grpc-port", o.grpc_port, 0, 65'535, ""),
  };
  for (const absl::Status& check : checks) {
    if (!check.ok()) return check;
  }
  if (absl::StatusOr<LogLevel> level = ParseLogLevel(o.log_level); !level.ok()) {
    return Bad(absl::StrCat("--log-level: ", std::string(level.status().message())));
  }
  if (!(o.gpu_memory_utilization > 0 && o.gpu_memory_utilization <= 1)) {
    return Bad(absl::StrCat("--gpu-memory-utilization ", o.gpu_memory_utilization,
                            ": expected more than 0 and at most 1"));
  }
  for (const auto& [name, seconds] : {std::pair("--drain-timeout", o.drain_timeout_s),
                                      std::pair("--recovery-timeout", o.recovery_timeout_s)}) {
    if (!(seconds >= 0 && seconds <= 86'400)) {
      return Bad(absl::StrCat(name, " ", seconds, ": expected 0 to 86400 seconds"));
    }
  }
  if (o.max_num_batched_tokens != 0 && o.max_num_seqs > o.max_num_batched_tokens) {
    return Bad(absl::StrCat("--max-num-seqs ", o.max_num_seqs, " exceeds --max-num-batched-tokens ",
                            o.max_num_batched_tokens, ": every running sequence needs a token"));
  }
  if (o.http_port != 0 && o.http_port == o.grpc_port) {
    return Bad(absl::StrCat("--http-port ", o.http_port, " is --grpc-port, too"));
  }
  if (o.insecure) return absl::OkStatus();
  for (const auto& [name, address] :
       {std::pair("--host", o.host), std::pair("--worker-address", o.worker_address)}) {
    if (!IsLocalAddress(address)) {
      return Bad(absl::StrCat(name, " ", address,
                              ": others could read the traffic; use loopback, or --insecure on a "
                              "network you trust"));
    }
  }
  return absl::OkStatus();
}

std::string PrintConfig(const CLI::App& app) {
  std::string text;
  for (const CLI::Option* option : app.get_options()) {
    const std::string name = LongName(*option);
    if (IsOneOf(name, {"", "help", "version", "config", "print-config"})) continue;
    const bool is_flag = option->get_expected_max() == 0;
    std::string value = option->count() > 0 ? option->as<std::string>() : option->get_default_str();
    if (is_flag && value.empty()) value = name == "enable-prefix-caching" ? "true" : "false";
    const bool plain = !value.empty() && std::all_of(value.begin(), value.end(), [](char c) {
      return absl::ascii_isalnum(static_cast<unsigned char>(c)) || std::strchr("._:/+-", c);
    });
    absl::StrAppend(&text, name, " = ", plain ? value : absl::StrCat("\"", value, "\""), "\n");
  }
  return text;
}

bool IsLocalAddress(const std::string& address) {
  if (absl::StartsWith(address, "unix:")) return true;
  std::string host = address;
  const size_t colon = host.rfind(':');
  // One colon separates a port; an address in brackets may be followed by one.
  if (colon != std::string::npos && (host.find(':') == colon || host.front() == '[')) {
    const size_t bracket = host.rfind(']');
    if (bracket == std::string::npos || bracket < colon) host.resize(colon);
  }
  return absl::StartsWith(host, "127.") || host == "localhost" || host == "::1" || host == "[::1]";
}

}  // namespace lockstep
