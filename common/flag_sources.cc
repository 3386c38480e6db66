#include "common/flag_sources.h"

#include <CLI/CLI.hpp>
#include <algorithm>
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

namespace lockstep {
namespace {

// A file's bytes come back in these: one line, of text that a terminal shows.
absl::Status Bad(std::string_view message) {
  constexpr size_t kLongest = 1024;
  std::string line;
  for (const char c : message.substr(0, kLongest)) {
    if (absl::ascii_isprint(static_cast<unsigned char>(c))) {
      line += c;
    } else {
      absl::StrAppend(&line, "\\x", absl::Hex(static_cast<unsigned char>(c), absl::kZeroPad2));
    }
  }
  if (message.size() > kLongest) line += "...";
  return absl::InvalidArgumentError(line);
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

}  // namespace

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

std::string PrintConfig(const CLI::App& app) {
  static const std::set<std::string> apart = {"", "help", "version", "config", "print-config"};
  std::string text;
  for (const CLI::Option* option : app.get_options()) {
    const std::string name = LongName(*option);
    if (apart.count(name) > 0) continue;
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

}  // namespace lockstep
