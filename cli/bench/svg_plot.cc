#include "cli/bench/svg_plot.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace lockstep {
namespace {

// Pixels. The legend's further lines make the plot higher.
constexpr double kWidth = 520, kInnerHeight = 196;
constexpr double kLeft = 62, kRight = 14, kBottom = 46;
constexpr double kInnerWidth = kWidth - kLeft - kRight;
constexpr int kXTicks = 6, kYTicks = 5;
constexpr size_t kColours = 6, kDashes = 3;  // classes c0 to c5; solid, d1, d2
constexpr double kLegendTop = 35, kLegendLine = 14, kKey = 16, kKeyGap = 5, kNameGap = 14;
constexpr double kLetter = 6.2;

struct Axis {
  double max = 1, step = 1;

  static Axis Over(double max, int ticks) {
    Axis axis;
    axis.step = TickStep(max, ticks);
    axis.max = std::max(std::ceil(max / axis.step - 1e-9), 1.0) * axis.step;
    return axis;
  }
};

// Where each name of the legend stands, and the plot under them.
struct Layout {
  std::vector<std::pair<double, double>> names;
  double top = 0;

  explicit Layout(const Plot& plot) {
    double x = kLeft, y = kLegendTop;
    for (const PlotSeries& series : plot.series) {
      const double width = kKey + kKeyGap + kLetter * static_cast<double>(series.name.size());
      if (x > kLeft && x + width > kWidth) {
        x = kLeft;
        y += kLegendLine;
      }
      names.emplace_back(x, y);
      x += width + kNameGap;
    }
    top = y + 16;
  }
  double bottom() const { return top + kInnerHeight; }
  double height() const { return bottom() + kBottom; }
};

double X(const Axis& axis, double value) { return kLeft + value / axis.max * kInnerWidth; }
double Y(const Layout& layout, const Axis& axis, double value) {
  return layout.bottom() - value / axis.max * kInnerHeight;
}

// More series than colours are told apart by their dashes.
std::string LineClass(const Plot& plot, size_t index) {
  const size_t dash = (index / kColours + (plot.series[index].dashed ? 1 : 0)) % kDashes;
  return absl::StrCat("line c", index % kColours, dash == 0 ? "" : absl::StrCat(" d", dash));
}

void DrawAxes(const Plot& plot, const Layout& layout, const Axis& x, const Axis& y,
              std::string* svg) {
  for (int i = 0; i * y.step <= y.max * (1 + 1e-9); ++i) {
    const double value = i * y.step, at = Y(layout, y, value);
    absl::StrAppendFormat(svg, "<line class=\"grid\" x1=\"%g\" x2=\"%g\" y1=\"%.1f\" y2=\"%.1f\"/>",
                          kLeft, kWidth - kRight, at, at);
    absl::StrAppendFormat(
        svg, "<text class=\"tick\" x=\"%g\" y=\"%.1f\" text-anchor=\"end\">%g</text>\n", kLeft - 6,
        at + 4, value);
  }
  for (int i = 0; i * x.step <= x.max * (1 + 1e-9); ++i) {
    const double value = i * x.step;
    absl::StrAppendFormat(
        svg, "<text class=\"tick\" x=\"%.1f\" y=\"%g\" text-anchor=\"middle\">%g</text>\n",
        X(x, value), layout.bottom() + 16, value);
  }
  absl::StrAppendFormat(svg, "<text class=\"title\" x=\"%g\" y=\"18\">%s</text>\n", kLeft,
                        EscapeHtml(plot.title));
  absl::StrAppendFormat(
      svg, "<text class=\"label\" x=\"%g\" y=\"%g\" text-anchor=\"middle\">%s</text>\n",
      kLeft + kInnerWidth / 2, layout.height() - 8, EscapeHtml(plot.x_label));
  absl::StrAppendFormat(svg,
                        "<text class=\"label\" transform=\"translate(14 %g) rotate(-90)\" "
                        "text-anchor=\"middle\">%s</text>\n",
                        layout.top + kInnerHeight / 2, EscapeHtml(plot.y_label));
}

void DrawSeries(const Plot& plot, size_t index, const Layout& layout, const Axis& x, const Axis& y,
                std::string* svg) {
  const PlotSeries& series = plot.series[index];
  const std::string colour = absl::StrCat("c", index % kColours);
  absl::StrAppendFormat(svg, "<polyline class=\"%s\" points=\"", LineClass(plot, index));
  for (const auto& [px, py] : series.points) {
    absl::StrAppendFormat(svg, "%.1f,%.1f ", X(x, px), Y(layout, y, py));
  }
  absl::StrAppend(svg, "\"/>\n");
  for (const auto& [px, py] : series.points) {
    absl::StrAppendFormat(svg,
                          "<circle class=\"dot %s%s\" cx=\"%.1f\" cy=\"%.1f\" r=\"%d\"><title>%s: "
                          "%.5g, %.5g</title></circle>\n",
                          colour, plot.markers ? "" : " faint", X(x, px), Y(layout, y, py),
                          plot.markers ? 3 : 5, EscapeHtml(series.name), px, py);
  }
}

void DrawLegend(const Plot& plot, const Layout& layout, std::string* svg) {
  for (size_t i = 0; i < plot.series.size(); ++i) {
    const auto [x, y] = layout.names[i];
    absl::StrAppendFormat(svg, "<line class=\"%s\" x1=\"%g\" x2=\"%g\" y1=\"%g\" y2=\"%g\"/>",
                          LineClass(plot, i), x, x + kKey, y - 4, y - 4);
    absl::StrAppendFormat(svg, "<text class=\"tick\" x=\"%g\" y=\"%g\">%s</text>\n",
                          x + kKey + kKeyGap, y, EscapeHtml(plot.series[i].name));
  }
}

}  // namespace

double TickStep(double max, int ticks) {
  if (!(max > 0) || !std::isfinite(max)) return 1;
  const double raw = max / ticks;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (raw <= factor * power * (1 + 1e-9)) return factor * power;
  }
  return 10 * power;
}

std::string EscapeHtml(std::string_view text) {
  std::string result;
  for (const char c : text) {
    switch (c) {
      case '&':
        result += "&amp;";
        break;
      case '<':
        result += "&lt;";
        break;
      case '>':
        result += "&gt;";
        break;
      case '"':
        result += "&quot;";
        break;
      case '\'':
        result += "&#39;";
        break;
      default:
        result += c;
    }
  }
  return result;
}

std::string SvgPlot(const Plot& plot) {
  double x_max = 0, y_max = 0;
  bool any = false;
  for (const PlotSeries& series : plot.series) {
    for (const auto& [px, py] : series.points) {
      x_max = std::max(x_max, px);
      y_max = std::max(y_max, py);
      any = true;
    }
  }
  const Axis x = Axis::Over(x_max, kXTicks), y = Axis::Over(y_max, kYTicks);
  const Layout layout(plot);
  std::string svg =
      absl::StrFormat("<svg class=\"plot\" viewBox=\"0 0 %g %g\" role=\"img\" aria-label=\"%s\">\n",
                      kWidth, layout.height(), EscapeHtml(plot.title));
  DrawAxes(plot, layout, x, y, &svg);
  if (!any) {
    absl::StrAppendFormat(
        &svg, "<text class=\"label\" x=\"%g\" y=\"%g\" text-anchor=\"middle\">no data</text>\n",
        kLeft + kInnerWidth / 2, layout.top + kInnerHeight / 2);
  }
  DrawLegend(plot, layout, &svg);
  for (size_t i = 0; i < plot.series.size(); ++i) DrawSeries(plot, i, layout, x, y, &svg);
  return svg + "</svg>\n";
}

std::string_view PlotStyle() {
  return R"css(
.plot { width: 100%; height: auto; background: var(--card); border-radius: 6px; }
.plot text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.plot .title { font-size: 13px; font-weight: 600; fill: var(--ink); }
.plot .grid { stroke: var(--rule); stroke-width: 1; }
.plot .line { fill: none; stroke-width: 1.8; }
.plot .faint { fill-opacity: 0; stroke: none; }
.c0 { --c: #2f6fde; } .c1 { --c: #d9622b; } .c2 { --c: #2a9d5c; }
.c3 { --c: #b23a8e; } .c4 { --c: #c29a12; } .c5 { --c: #5c6b7a; }
.plot .line { stroke: var(--c); }
.plot .d1 { stroke-dasharray: 5 3; } .plot .d2 { stroke-dasharray: 1.5 2.5; }
.plot .dot { fill: var(--c); }
)css";
}

}  // namespace lockstep
