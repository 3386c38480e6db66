#include "cli/top/metrics_text.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "absl/strings/numbers.h"
#include "absl/strings/string_view.h"

namespace lockstep {
namespace {

// Reads `text` from the front; every Take leaves what follows it.
class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  bool done() const { return text_.empty(); }
  bool Skip(char c) {
    if (text_.empty() || text_.front() != c) return false;
    text_.remove_prefix(1);
    return true;
  }
  void SkipBlanks() {
    while (Skip(' ') || Skip('\t')) {
    }
  }
  std::string Until(std::string_view ends) {
    const size_t end = std::min(text_.find_first_of(ends), text_.size());
    std::string taken(text_.substr(0, end));
    text_.remove_prefix(end);
    return taken;
  }
  // After the opening quote; takes the closing one.
  std::optional<std::string> Quoted() {
    std::string value;
    while (!text_.empty()) {
      char c = text_.front();
      text_.remove_prefix(1);
      if (c == '"') return value;
      if (c == '\\' && !text_.empty()) {
        c = text_.front() == 'n' ? '\n' : text_.front();
        text_.remove_prefix(1);
      }
      value += c;
    }
    return std::nullopt;
  }

 private:
  std::string_view text_;
};

bool ParseLabels(Reader* reader, MetricLabels* labels) {
  while (!reader->Skip('}')) {
    reader->SkipBlanks();
    const std::string key = reader->Until("=}");
    if (!reader->Skip('=') || !reader->Skip('"')) return false;
    std::optional<std::string> value = reader->Quoted();
    if (!value) return false;
    (*labels)[key] = *std::move(value);
    reader->Skip(',');
    if (reader->done()) return false;
  }
  return true;
}

bool ParseNumber(const std::string& text, double* value) {
  if (text == "+Inf") {
    *value = std::numeric_limits<double>::infinity();
    return true;
  }
  return absl::SimpleAtod(text, value);
}

bool Carries(const MetricSample& sample, const MetricLabels& wanted) {
  return std::all_of(wanted.begin(), wanted.end(), [&](const auto& each) {
    const auto found = sample.labels.find(each.first);
    return found != sample.labels.end() && found->second == each.second;
  });
}

// Counts by upper bound, over all series of the histogram that carry `labels`.
std::map<double, double> Buckets(const MetricsText& text, const std::string& name,
                                 const MetricLabels& labels) {
  std::map<double, double> buckets;
  for (const MetricSample& sample : text.Samples(name + "_bucket")) {
    const auto bound = sample.labels.find("le");
    double le = 0;
    if (bound == sample.labels.end() || !ParseNumber(bound->second, &le)) continue;
    if (Carries(sample, labels)) buckets[le] += sample.value;
  }
  return buckets;
}

}  // namespace

MetricsText MetricsText::Parse(std::string_view text) {
  MetricsText result;
  Reader lines(text);
  while (!lines.done()) {
    const std::string line = lines.Until("\n");
    lines.Skip('\n');
    if (line.empty() || line.front() == '#') continue;
    Reader reader(line);
    const std::string name = reader.Until("{ ");
    MetricSample sample;
    if (reader.Skip('{') && !ParseLabels(&reader, &sample.labels)) continue;
    reader.SkipBlanks();
    if (ParseNumber(reader.Until(" \r"), &sample.value)) {
      result.samples_[name].push_back(std::move(sample));
    }
  }
  return result;
}

const std::vector<MetricSample>& MetricsText::Samples(const std::string& name) const {
  static const std::vector<MetricSample>& none = *new std::vector<MetricSample>;
  const auto found = samples_.find(name);
  return found == samples_.end() ? none : found->second;
}

std::optional<double> MetricsText::Value(const std::string& name,
                                         const MetricLabels& labels) const {
  std::optional<double> sum;
  for (const MetricSample& sample : Samples(name)) {
    if (Carries(sample, labels)) sum = sum.value_or(0) + sample.value;
  }
  return sum;
}

std::string MetricsText::Label(const std::string& name, const std::string& label) const {
  const std::vector<MetricSample>& samples = Samples(name);
  if (samples.empty()) return "";
  const auto found = samples.front().labels.find(label);
  return found == samples.front().labels.end() ? "" : found->second;
}

std::vector<std::string> MetricsText::LabelValues(const std::string& name,
                                                  const std::string& label) const {
  // Shorter first puts 10 after 9.
  const auto by_number = [](const std::string& a, const std::string& b) {
    return a.size() != b.size() ? a.size() < b.size() : a < b;
  };
  std::set<std::string, decltype(by_number)> values(by_number);
  for (const MetricSample& sample : Samples(name)) {
    const auto found = sample.labels.find(label);
    if (found != sample.labels.end()) values.insert(found->second);
  }
  return {values.begin(), values.end()};
}

std::optional<double> HistogramDelta::mean() const {
  if (count <= 0) return std::nullopt;
  return sum / count;
}

std::optional<double> HistogramDelta::quantile(double q) const {
  if (count <= 0 || buckets.empty()) return std::nullopt;
  const double wanted = q * count;
  double low = 0, below = 0;
  for (const auto& [bound, up_to] : buckets) {
    if (up_to >= wanted && up_to > below) {
      if (std::isinf(bound)) return low;
      return low + (bound - low) * (wanted - below) / (up_to - below);
    }
    if (!std::isinf(bound)) low = bound;
    below = up_to;
  }
  return low;
}

HistogramDelta DeltaOf(const MetricsText& before, const MetricsText& now, const std::string& name,
                       const MetricLabels& labels) {
  HistogramDelta delta;
  const double count = now.Value(name + "_count", labels).value_or(0);
  const double count_before = before.Value(name + "_count", labels).value_or(0);
  const bool anew = count < count_before;
  delta.count = count - (anew ? 0 : count_before);
  delta.sum = now.Value(name + "_sum", labels).value_or(0) -
              (anew ? 0 : before.Value(name + "_sum", labels).value_or(0));
  const std::map<double, double> earlier =
      anew ? std::map<double, double>() : Buckets(before, name, labels);
  for (const auto& [bound, total] : Buckets(now, name, labels)) {
    const auto found = earlier.find(bound);
    delta.buckets.emplace_back(bound, total - (found == earlier.end() ? 0 : found->second));
  }
  return delta;
}

double CounterDelta(const MetricsText& before, const MetricsText& now, const std::string& name,
                    const MetricLabels& labels) {
  const double total = now.Value(name, labels).value_or(0);
  const double earlier = before.Value(name, labels).value_or(0);
  return total < earlier ? total : total - earlier;
}

}  // namespace lockstep
