// Certificates as flags name them: of the doors (--ssl-certfile, ...) and of the
// workers' plane (--worker-ssl-certfile, ...). Those who use them read them again
// when they change; what is wrong by then is logged and the earlier ones stay.
#ifndef LOCKSTEP_COMMON_TLS_FILES_H_
#define LOCKSTEP_COMMON_TLS_FILES_H_

#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace lockstep {

struct TlsFiles {
  std::string certificate;  // PREFIX-certfile: PEM, one's own first; "" for plain text
  std::string key;          // PREFIX-keyfile: PEM, without a passphrase
  std::string client_ca;    // PREFIX-ca-certs: the other side needs a certificate of these

  bool enabled() const { return !certificate.empty(); }
};

// Whether a server can start with them. One line that names flag and file:
// missing, no PEM, expired, a key of another certificate. `flags`: how the flags'
// names begin.
absl::Status CheckTlsFiles(const TlsFiles& files, std::string_view flags = "--ssl");

}  // namespace lockstep

#endif  // LOCKSTEP_COMMON_TLS_FILES_H_
