// An HTTP/1.1 answer as bytes. Private to connection.cc.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_REPLY_BYTES_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_REPLY_BYTES_H_

#include <string>

#include "coordinator/api/http/exchange.h"

namespace lockstep {

struct WholeReplyOptions {
  bool keep_alive = false;
  bool without_body = false;  // to HEAD, which is told the body's length alone
};

// With its Content-Length.
std::string WholeReply(const HttpReply& reply, WholeReplyOptions options);

// The beginning of an answer whose length is not known: up to its body. Without
// chunks, which HTTP/1.0 has not, the connection's end is the answer's.
std::string StreamHead(const HttpReply& reply, bool keep_alive, bool chunked);

// Nothing of an empty body: an empty chunk would be the last.
void AppendChunk(const std::string& body, bool chunked, std::string* out);
inline constexpr char kLastChunk[] = "0\r\n\r\n";

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_REPLY_BYTES_H_
