// One picture of a server, from two scrapes of its metrics. Pure: the same
// scrapes make the same text.
#ifndef LOCKSTEP_CLI_TOP_FRAME_H_
#define LOCKSTEP_CLI_TOP_FRAME_H_

#include <string>

#include "cli/top/metrics_text.h"

namespace lockstep {

// What happened in the `seconds` between the scrapes, and what is now. Lines
// are at most 100 wide. "-" where nothing happened or the server has no such figure.
std::string RenderFrame(const std::string& server, const MetricsText& before,
                        const MetricsText& now, double seconds);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_TOP_FRAME_H_
