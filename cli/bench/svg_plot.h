// A line plot as an SVG element, for reports that are one file: no script, no
// font, no link. Colours come from the page's style sheet (PlotStyle), so that
// it can follow a dark or light screen. Every point tells its values on hover.
#ifndef LOCKSTEP_CLI_BENCH_SVG_PLOT_H_
#define LOCKSTEP_CLI_BENCH_SVG_PLOT_H_

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lockstep {

struct PlotSeries {
  std::string name;
  std::vector<std::pair<double, double>> points;  // x ascending
  bool dashed = false;                            // shows one that lies under it
};

struct Plot {
  std::string title, x_label, y_label;
  std::vector<PlotSeries> series;
  bool markers = true;  // a dot on each point
};

// Both axes start at zero. A plot without points says so.
std::string SvgPlot(const Plot& plot);

// CSS for the classes that SvgPlot uses.
std::string_view PlotStyle();

// &, <, > and quotes as entities.
std::string EscapeHtml(std::string_view text);

// The step of an axis: 1, 2 or 5 times a power of ten, about `ticks` of them up to `max`.
double TickStep(double max, int ticks);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_BENCH_SVG_PLOT_H_
