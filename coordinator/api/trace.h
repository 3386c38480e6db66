// W3C trace context: what a caller's `traceparent` says goes to the log beside
// the request's id, so that its trace can be found from ours and ours from its.
#ifndef LOCKSTEP_COORDINATOR_API_TRACE_H_
#define LOCKSTEP_COORDINATOR_API_TRACE_H_

#include <string_view>

namespace lockstep {

// "00-<32 hex digits>-<16 hex digits>-<2 hex digits>", neither id all zero; later
// versions may have more.
bool IsTraceparent(std::string_view value);

// A line with the request's id: at info level with a traceparent, else at debug
// level. What is not one is no error, as the standard has it.
void LogTrace(std::string_view request_id, std::string_view traceparent);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_TRACE_H_
