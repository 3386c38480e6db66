// The HTTP door's TLS: a context for each connection that is accepted, made anew
// when the files have changed. Connections keep the one they began with.
#ifndef LOCKSTEP_COORDINATOR_API_HTTP_TLS_CONTEXT_H_
#define LOCKSTEP_COORDINATOR_API_HTTP_TLS_CONTEXT_H_

#include <boost/asio/ssl/context.hpp>
#include <memory>

#include "absl/status/status.h"
#include "common/tls_files.h"
#include "coordinator/api/watched_file.h"

namespace lockstep {

// Of one thread or strand.
class TlsContext {
 public:
  explicit TlsContext(TlsFiles files);

  absl::Status Load();
  // Reads the files again when they have changed; what was there stays where the
  // new ones are not right.
  std::shared_ptr<boost::asio::ssl::context> Current();

 private:
  const TlsFiles files_;
  WatchedFiles watched_;
  std::shared_ptr<boost::asio::ssl::context> context_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_HTTP_TLS_CONTEXT_H_
