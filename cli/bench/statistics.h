// Order statistics and processor time, for the measuring commands.
#ifndef LOCKSTEP_CLI_BENCH_STATISTICS_H_
#define LOCKSTEP_CLI_BENCH_STATISTICS_H_

#include <utility>
#include <vector>

namespace lockstep {

// The q-th quantile (0 to 1), linear between neighbours. 0 for no values.
double Quantile(std::vector<double> values, double q);
inline double Median(std::vector<double> values) { return Quantile(std::move(values), 0.5); }
double Mean(const std::vector<double>& values);

// User and system seconds this process has spent so far, over all threads.
double ProcessCpuSeconds();

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_BENCH_STATISTICS_H_
