#include "cli/bench/serve_report.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/bench/svg_plot.h"

namespace lockstep {
namespace {

using Json = nlohmann::ordered_json;

constexpr char kPageStyle[] = R"css(
:root { --ink: #1c2430; --soft: #566274; --rule: #e3e7ed; --card: #f8f9fb; --page: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #9aa7b8; --rule: #2c3542; --card: #1a212b; --page: #12171f; }
}
body { margin: 2rem auto; max-width: 1120px; padding: 0 1rem; background: var(--page);
       color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p { color: var(--soft); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--rule);
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 600; }
)css";

struct Column {
  const char* title;
  std::string (*cell)(const Json& point);
};

double Number(const Json& point, const char* key) { return point.at(key).get<double>(); }
// Of a distribution that is not null.
double Number(const Json& point, const char* key, const char* part) {
  return point.at(key).at(part).get<double>();
}

std::string Part(const Json& point, const char* key, const char* part, int digits) {
  if (point.at(key).is_null()) return "-";
  return absl::StrFormat("%.*f", digits, Number(point, key, part));
}

const std::vector<Column>& Columns() {
  static const std::vector<Column>& columns = *new std::vector<Column>{
      {"load", [](const Json& p) { return p.at("load").get<std::string>(); }},
      {"done", [](const Json& p) { return absl::StrCat(p.at("completed").get<int64_t>()); }},
      {"refused", [](const Json& p) { return absl::StrCat(p.at("refused").get<int64_t>()); }},
      {"failed", [](const Json& p) { return absl::StrCat(p.at("failed").get<int64_t>()); }},
      {"req/s",
       [](const Json& p) { return absl::StrFormat("%.2f", Number(p, "requests_per_second")); }},
      {"goodput/s",
       [](const Json& p) { return absl::StrFormat("%.2f", Number(p, "goodput_per_second")); }},
      {"in SLO",
       [](const Json& p) { return absl::StrFormat("%.0f%%", 100 * Number(p, "good_share")); }},
      {"out tok/s",
       [](const Json& p) {
         return absl::StrFormat("%.0f", Number(p, "output_tokens_per_second"));
       }},
      {"TTFT p50", [](const Json& p) { return Part(p, "ttft_ms", "p50", 1); }},
      {"p99", [](const Json& p) { return Part(p, "ttft_ms", "p99", 1); }},
      {"TPOT p50", [](const Json& p) { return Part(p, "tpot_ms", "p50", 2); }},
      {"p99", [](const Json& p) { return Part(p, "tpot_ms", "p99", 2); }},
      {"gap p99", [](const Json& p) { return Part(p, "gap_ms", "p99", 2); }},
  };
  return columns;
}

std::string HtmlTable(const Json& report) {
  std::string html = "<div class=\"scroll\"><table><tr>";
  for (const Column& column : Columns()) absl::StrAppend(&html, "<th>", column.title, "</th>");
  absl::StrAppend(&html, "</tr>\n");
  for (const Json& point : report.at("points")) {
    absl::StrAppend(&html, "<tr>");
    for (const Column& column : Columns()) {
      absl::StrAppend(&html, "<td>", EscapeHtml(column.cell(point)), "</td>");
    }
    absl::StrAppend(&html, "</tr>\n");
  }
  return html + "</table></div>\n";
}

PlotSeries AgainstLoad(const std::vector<Json>& points, const std::string& name, const char* key,
                       const char* part = nullptr) {
  PlotSeries series{name, {}};
  for (const Json& point : points) {
    if (point.at(key).is_null()) continue;
    series.points.emplace_back(Number(point, "value"),
                               part != nullptr ? Number(point, key, part) : Number(point, key));
  }
  return series;
}

Plot PercentilesAgainstLoad(const std::vector<Json>& points, const std::string& title,
                            const std::string& x_label, const char* key) {
  Plot plot{title, x_label, "ms", {}};
  for (const char* part : {"p50", "p95", "p99"}) {
    plot.series.push_back(AgainstLoad(points, part, key, part));
  }
  return plot;
}

// How figures move with the load, where a loop has several points.
std::string SweepPlots(const Json& report, const char* loop, const std::string& x_label) {
  std::vector<Json> points;
  for (const Json& point : report.at("points")) {
    if (point.at("loop") == loop) points.push_back(point);
  }
  if (points.size() < 2) return "";
  std::sort(points.begin(), points.end(), [](const Json& a, const Json& b) {
    return a.at("value").get<double>() < b.at("value").get<double>();
  });
  Plot rates{"Requests answered, and within the SLO",
             x_label,
             "requests/s",
             {AgainstLoad(points, "answered", "requests_per_second"),
              AgainstLoad(points, "goodput", "goodput_per_second")}};
  rates.series.back().dashed = true;  // often the same
  const Plot tokens{"Output",
                    x_label,
                    "tokens/s",
                    {AgainstLoad(points, "output tokens", "output_tokens_per_second")}};
  return absl::StrCat(
      "<h2>Against load, ", loop, " loop</h2>\n<div class=\"plots\">\n",
      SvgPlot(PercentilesAgainstLoad(points, "Time to first token", x_label, "ttft_ms")),
      SvgPlot(PercentilesAgainstLoad(points, "Time per output token", x_label, "tpot_ms")),
      SvgPlot(rates), SvgPlot(tokens), "</div>\n");
}

Plot Cumulative(const Json& report, const std::string& title, const char* key) {
  Plot plot{title, "ms", "% of requests", {}, /*markers=*/false};
  for (const Json& point : report.at("points")) {
    PlotSeries series{point.at("load").get<std::string>(), {}};
    // Without points it still has its place: colours are the same in every plot.
    const Json percentiles =
        point.at(key).is_null() ? Json::array() : point.at(key).at("percentiles");
    for (size_t i = 0; i < percentiles.size(); ++i) {
      series.points.emplace_back(
          percentiles[i].get<double>(),
          100.0 * static_cast<double>(i) / static_cast<double>(percentiles.size() - 1));
    }
    plot.series.push_back(std::move(series));
  }
  return plot;
}

Plot OverTime(const Json& report, const std::string& title, const std::string& unit,
              const char* key) {
  Plot plot{title, "seconds", unit, {}, /*markers=*/false};
  for (const Json& point : report.at("points")) {
    PlotSeries series{point.at("load").get<std::string>(), {}};
    const double slice_s = Number(point, "slice_seconds");
    const Json& values = point.at(key);
    for (size_t i = 0; i < values.size(); ++i) {
      series.points.emplace_back((static_cast<double>(i) + 0.5) * slice_s, values[i].get<double>());
    }
    plot.series.push_back(std::move(series));
  }
  return plot;
}

// "bfloat16", "bfloat16 with fp8 matrices".
std::string Precision(const Json& target) {
  std::string dtype = target.at("dtype").get<std::string>();
  const auto known = target.find("quantization");  // null where it is not
  const std::string how =
      known != target.end() && known->is_string() ? known->get<std::string>() : "";
  return how.empty() ? dtype : absl::StrCat(dtype, " with ", how, " matrices");
}

std::string Sentence(const Json& report) {
  const Json& target = report.at("target");
  return absl::StrFormat(
      "%s (%s, %s), tensor parallel size %d on %s. %s. A request is good with its first token "
      "within %g ms and at most %g ms a token after it.",
      target.at("model").get<std::string>(), target.at("architecture").get<std::string>(),
      Precision(target), target.at("tensor_parallel_size").get<int>(),
      target.at("device").get<std::string>(), report.at("lengths").get<std::string>(),
      report.at("slo").at("ttft_ms").get<double>(), report.at("slo").at("tpot_ms").get<double>());
}

}  // namespace

std::string ServeTable(const Json& report) {
  std::string table = Sentence(report) + "\n\n";
  for (const Column& column : Columns()) absl::StrAppendFormat(&table, "%10s", column.title);
  table += "\n";
  for (const Json& point : report.at("points")) {
    for (const Column& column : Columns())
      absl::StrAppendFormat(&table, "%10s", column.cell(point));
    table += "\n";
    const std::string failure = point.at("first_failure").get<std::string>();
    if (!failure.empty()) absl::StrAppend(&table, "    first failure: ", failure, "\n");
    if (const int64_t cached = point.at("cached_prompt_tokens").get<int64_t>(); cached > 0) {
      absl::StrAppend(&table, "    ", cached, " prompt tokens came from the prefix cache\n");
    }
  }
  return table;
}

std::string ServeHtml(const Json& report) {
  return absl::StrCat(
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<title>Lockstep under load</title>\n<style>",
      kPageStyle, std::string(PlotStyle()),
      "</style></head><body>\n<h1>Lockstep under load</h1>\n<p>", EscapeHtml(Sentence(report)),
      " Times are in ms.</p>\n", HtmlTable(report),
      SweepPlots(report, "open", "requests/s offered"),
      SweepPlots(report, "closed", "requests under way"),
      "<h2>Distributions</h2>\n<div class=\"plots\">\n",
      SvgPlot(Cumulative(report, "Time to first token", "ttft_ms")),
      SvgPlot(Cumulative(report, "Time per output token", "tpot_ms")),
      "</div>\n<h2>Over time</h2>\n<div class=\"plots\">\n",
      SvgPlot(OverTime(report, "Output", "tokens/s", "slice_tokens_per_second")),
      SvgPlot(OverTime(report, "Requests under way", "requests", "slice_running")),
      "</div>\n</body></html>\n");
}

}  // namespace lockstep
