#include "common/flag_sources.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "common/variables.h"

namespace lockstep {

absl::Status FlagError(std::string_view message) {
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

namespace {

// "--max-model-len" of an option that has that long name.
std::string LongName(const CLI::Option& option) {
  return option.get_lnames().empty() ? "" : option.get_lnames().front();
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

// CLI11 takes the argument after "--name=" for an empty value; apart, it is one, but
// to a switch it would be an argument of its own. `source`: said of a bad one.
absl::Status Append(const CLI::App& app, const std::string& name, const std::string& value,
                    const std::string& source, std::vector<std::string>* args) {
  if (!value.empty()) {
    args->push_back(absl::StrCat("--", name, "=", value));
    return absl::OkStatus();
  }
  const CLI::Option* const option = app.get_option_no_throw("--" + name);
  if (option != nullptr && option->get_expected_max() == 0) {
    return FlagError(absl::StrCat("--", name, " '': expected true or false", source));
  }
  args->push_back(absl::StrCat("--", name));
  args->push_back("");
  return absl::OkStatus();
}

// A value that begins and ends with `quote`. Between double ones \", \\, \n and \r
// stand for the character; any other backslash is itself. `rest` begins behind the
// first quote and ends up behind the last one; false without a last one.
bool TakeQuoted(char quote, std::string_view* rest, std::string* value) {
  static constexpr std::string_view kEscaped = "\"\\nr", kMeant = "\"\\\n\r";
  for (size_t i = 0; i < rest->size(); ++i) {
    char c = (*rest)[i];
    if (c == quote) {
      rest->remove_prefix(i + 1);
      return true;
    }
    const size_t escape = quote == '"' && c == '\\' && i + 1 < rest->size()
                              ? kEscaped.find((*rest)[i + 1])
                              : kEscaped.npos;
    if (escape != kEscaped.npos) {
      c = kMeant[escape];
      ++i;
    }
    *value += c;
  }
  return false;
}

std::string Quoted(const std::string& value) {
  return absl::StrCat(
      "\"",
      absl::StrReplaceAll(value, {{"\\", "\\\\"}, {"\"", "\\\""}, {"\n", "\\n"}, {"\r", "\\r"}}),
      "\"");
}

// "value", "value # comment", "\"any value\" # comment"; false: not one value.
bool TakeValue(std::string_view text, std::string* value) {
  if (!text.empty() && (text.front() == '"' || text.front() == '\'')) {
    const char quote = text.front();
    text.remove_prefix(1);
    if (!TakeQuoted(quote, &text, value)) return false;
    const std::string behind(text);
    const auto more = absl::StripLeadingAsciiWhitespace(behind);
    return more.empty() || (more.front() == '#' && more.size() < behind.size());
  }
  const size_t comment = std::min(text.find(" #"), text.find("\t#"));
  *value = std::string(absl::StripAsciiWhitespace(std::string(text.substr(0, comment))));
  return value->empty() || value->front() != '#';
}

absl::Status AppendFile(const CLI::App& app, const std::string& path,
                        std::vector<std::string>* args) {
  if (!std::filesystem::is_regular_file(path)) {
    return FlagError(absl::StrCat("--config ", path, ": no such file"));
  }
  std::ifstream file(path);
  if (!file) return FlagError(absl::StrCat("--config ", path, ": cannot read"));
  for (std::string raw; std::getline(file, raw);) {
    const std::string line(absl::StripAsciiWhitespace(raw));
    if (line.empty() || line.front() == '#' || line.front() == ';') continue;
    const size_t equals = line.find('=');
    const std::string key(absl::StripTrailingAsciiWhitespace(line.substr(0, equals)));
    if (key.empty() || key == "config" || app.get_option_no_throw("--" + key) == nullptr) {
      return FlagError(absl::StrCat("--config ", path, ": unknown key '", key,
                                    "': keys are flag names without dashes"));
    }
    std::string value = "true";  // a key alone
    if (equals != line.npos) {
      const std::string text(absl::StripLeadingAsciiWhitespace(line.substr(equals + 1)));
      value.clear();
      if (!TakeValue(text, &value)) {
        return FlagError(absl::StrCat("--config ", path, ": ", key, ": expected one value"));
      }
    }
    const std::string source = absl::StrCat(" (in --config ", path, ")");
    if (absl::Status added = Append(app, key, value, source, args); !added.ok()) return added;
  }
  return absl::OkStatus();
}

// What a value of CLI11's type name may be; "" where it says nothing more.
std::string_view Expected(const std::string& type) {
  if (absl::StartsWith(type, "UINT")) return "a whole number from 0";
  if (absl::StartsWith(type, "INT")) return "a whole number";
  if (absl::StartsWith(type, "FLOAT")) return "a number";
  return "";
}

}  // namespace

absl::Status SetEmptyValuesApart(const CLI::App& app, const std::vector<std::string>& args,
                                 std::vector<std::string>* apart) {
  const CLI::App* command = &app;
  for (auto arg = args.begin(); arg != args.end(); ++arg) {
    if (*arg == "--") {
      apart->insert(apart->end(), arg, args.end());
      break;
    }
    if (absl::StartsWith(*arg, "--") && arg->find('=') == arg->size() - 1) {
      const std::string name = arg->substr(2, arg->size() - 3);
      if (absl::Status added = Append(*command, name, "", "", apart); !added.ok()) return added;
      continue;
    }
    apart->push_back(*arg);
    const auto named = [&](const CLI::App* other) { return other->get_name() == *arg; };
    const std::vector<const CLI::App*> inner = command->get_subcommands(named);
    if (!inner.empty()) command = inner.front();
  }
  return absl::OkStatus();
}

absl::Status CheckNumbers(const CLI::App& app) {
  for (const CLI::Option* option : app.get_options()) {
    const std::string_view expected = Expected(option->get_type_name());
    if (expected.empty() || option->count() == 0) continue;
    for (const std::string& value : option->reduced_results()) {
      if (!value.empty()) continue;
      return FlagError(
          absl::StrCat("--", LongName(*option), " '': expected ", std::string(expected)));
    }
  }
  return absl::OkStatus();
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
    const std::string variable = FlagVariable(name);
    const char* const value = std::getenv(variable.c_str());
    if (value == nullptr || IsServiceLink(variable, value)) continue;
    const std::string source = absl::StrCat(" (", variable, " is set)");
    if (absl::Status added = Append(app, name, value, source, &all); !added.ok()) return added;
    from_environment.insert(name);
  }
  const size_t num_inherited = all.size();
  if (absl::Status added = SetEmptyValuesApart(app, args, &all); !added.ok()) return added;
  const auto refusal = [&](std::string line) {
    for (const std::string& name : from_environment) {
      if (absl::StrContains(line, absl::StrCat("--", name))) {
        absl::StrAppend(&line, " (", FlagVariable(name), " is set)");
      }
    }
    if (!path.empty() && num_inherited > from_environment.size()) {
      absl::StrAppend(&line, " (with --config ", path, ")");
    }
    return FlagError(line);
  };
  std::vector<std::string> reversed(all.rbegin(), all.rend());  // as CLI11 wants it
  try {
    app.parse(reversed);
  } catch (const CLI::CallForHelp&) {
    return absl::NotFoundError(app.help());
  } catch (const CLI::CallForVersion& e) {
    return absl::NotFoundError(absl::StrCat(e.what(), "\n"));
  } catch (const CLI::ExtrasError&) {
    return FlagError(absl::StrCat("unknown argument ", absl::StrJoin(app.remaining(), " "),
                                  ": --help lists what there is"));
  } catch (const CLI::ParseError& e) {
    return refusal(FlagErrorLine(app, e.what()));
  }
  const absl::Status numbers = CheckNumbers(app);
  return numbers.ok() ? numbers : refusal(std::string(numbers.message()));
}

std::string FlagErrorLine(const CLI::App& command, const std::string& what) {
  constexpr std::string_view kConvert = "Could not convert: ";
  std::string line = what.substr(0, what.find('\n'));
  if (line.empty()) return "bad command line";
  if (absl::StartsWith(line, std::string(kConvert))) {
    const size_t equals = line.find(" = ", kConvert.size());
    const std::string name = line.substr(kConvert.size(), equals - kConvert.size());
    const CLI::Option* option = command.get_option_no_throw(name);
    const std::string_view expected = option == nullptr ? "" : Expected(option->get_type_name());
    if (equals != std::string::npos && !expected.empty()) {
      return absl::StrCat(name, " '", line.substr(equals + 3), "': expected ",
                          std::string(expected));
    }
  }
  const size_t missing = line.find(": 1 required ");
  if (missing != std::string::npos && absl::EndsWith(line, " missing")) {
    return absl::StrCat(line.substr(0, missing), ": expected a value");
  }
  return line;
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
    absl::StrAppend(&text, name, " = ", plain ? value : Quoted(value), "\n");
  }
  return text;
}

}  // namespace lockstep
