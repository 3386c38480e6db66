// A Prometheus exposition, read back: what `lockstep top` knows of a server.
// Pure. Lines that are not understood are skipped, for a reader must outlive
// the server's next version.
#ifndef LOCKSTEP_CLI_TOP_METRICS_TEXT_H_
#define LOCKSTEP_CLI_TOP_METRICS_TEXT_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lockstep {

using MetricLabels = std::map<std::string, std::string>;

struct MetricSample {
  MetricLabels labels;
  double value = 0;
};

class MetricsText {
 public:
  static MetricsText Parse(std::string_view text);

  // The sum over the samples that carry all of `labels` (and perhaps more);
  // nothing when there is none.
  std::optional<double> Value(const std::string& name, const MetricLabels& labels = {}) const;
  // A label's value on the name's first sample; empty when there is none.
  std::string Label(const std::string& name, const std::string& label) const;
  // Every value of a label over a name's samples, ascending; numbers by value.
  std::vector<std::string> LabelValues(const std::string& name, const std::string& label) const;
  const std::vector<MetricSample>& Samples(const std::string& name) const;
  bool empty() const { return samples_.empty(); }

 private:
  std::map<std::string, std::vector<MetricSample>> samples_;
};

// What a histogram took in between two scrapes of it.
struct HistogramDelta {
  double count = 0, sum = 0;
  std::vector<std::pair<double, double>> buckets;  // upper bound; count at or below it

  std::optional<double> mean() const;
  // Linear within a bucket, as Prometheus does; the last finite bound above all.
  std::optional<double> quantile(double q) const;
};

// A server that was started anew counts from zero: its totals are the delta.
HistogramDelta DeltaOf(const MetricsText& before, const MetricsText& now, const std::string& name,
                       const MetricLabels& labels = {});
double CounterDelta(const MetricsText& before, const MetricsText& now, const std::string& name,
                    const MetricLabels& labels = {});

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_TOP_METRICS_TEXT_H_
