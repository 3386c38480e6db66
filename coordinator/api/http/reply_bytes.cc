#include "coordinator/api/http/reply_bytes.h"

#include <boost/beast/http/status.hpp>
#include <ctime>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace lockstep {
namespace {

std::string HttpDate() {
  const std::time_t now = std::time(nullptr);
  std::tm utc;
  gmtime_r(&now, &utc);
  char text[64];
  const size_t size = std::strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", &utc);
  return {text, size};
}

std::string HeadLines(const HttpReply& reply, bool keep_alive) {
  const boost::beast::string_view reason =
      boost::beast::http::obsolete_reason(static_cast<boost::beast::http::status>(reply.status));
  std::string head =
      absl::StrCat("HTTP/1.1 ", reply.status, " ", std::string(reason.data(), reason.size()),
                   "\r\nDate: ", HttpDate(), "\r\nServer: lockstep\r\n");
  absl::StrAppend(&head, "Content-Type: ", reply.content_type, "\r\n");
  for (const auto& [name, value] : reply.headers) {
    absl::StrAppend(&head, name, ": ", value, "\r\n");
  }
  absl::StrAppend(&head, "Connection: ", keep_alive ? "keep-alive" : "close", "\r\n");
  return head;
}

}  // namespace

std::string WholeReply(const HttpReply& reply, WholeReplyOptions options) {
  return absl::StrCat(HeadLines(reply, options.keep_alive), "Content-Length: ", reply.body.size(),
                      "\r\n\r\n", options.without_body ? "" : reply.body);
}

std::string StreamHead(const HttpReply& reply, bool keep_alive, bool chunked) {
  return absl::StrCat(HeadLines(reply, keep_alive),
                      chunked ? "Transfer-Encoding: chunked\r\n\r\n" : "\r\n");
}

void AppendChunk(const std::string& body, bool chunked, std::string* out) {
  if (body.empty()) return;
  if (chunked) absl::StrAppendFormat(out, "%x\r\n", body.size());
  *out += body;
  if (chunked) *out += "\r\n";
}

}  // namespace lockstep
