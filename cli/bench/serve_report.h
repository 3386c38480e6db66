// The report of `lockstep bench serve`, from its JSON: a table for terminals
// and one HTML file that needs nothing else to be read.
#ifndef LOCKSTEP_CLI_BENCH_SERVE_REPORT_H_
#define LOCKSTEP_CLI_BENCH_SERVE_REPORT_H_

#include <string>

#include "nlohmann/json.hpp"

namespace lockstep {

std::string ServeTable(const nlohmann::ordered_json& report);
std::string ServeHtml(const nlohmann::ordered_json& report);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_BENCH_SERVE_REPORT_H_
