// The certificates of the public plane, as flags name them. Both doors read them
// again when they change; what is wrong by then is logged and the earlier ones
// stay.
#ifndef LOCKSTEP_COORDINATOR_API_TLS_FILES_H_
#define LOCKSTEP_COORDINATOR_API_TLS_FILES_H_

#include <string>

#include "absl/status/status.h"

namespace lockstep {

struct TlsFiles {
  std::string certificate;  // --ssl-certfile: PEM, the server's own first; "" for plain text
  std::string key;          // --ssl-keyfile: PEM, without a passphrase
  std::string client_ca;    // --ssl-ca-certs: clients need a certificate of these; "" for none

  bool enabled() const { return !certificate.empty(); }
};

// Whether a server can start with them. One line that names flag and file:
// missing, no PEM, expired, a key of another certificate.
absl::Status CheckTlsFiles(const TlsFiles& files);

}  // namespace lockstep

#endif  // LOCKSTEP_COORDINATOR_API_TLS_FILES_H_
