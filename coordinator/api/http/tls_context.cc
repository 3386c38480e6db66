#include "coordinator/api/http/tls_context.h"

#include <openssl/ssl.h>

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/log.h"

namespace lockstep {
namespace {

namespace ssl = boost::asio::ssl;
using boost::system::error_code;

constexpr unsigned char kSessionContext[] = "lockstep";

}  // namespace

TlsContext::TlsContext(TlsFiles files)
    : files_(std::move(files)), watched_({files_.certificate, files_.key, files_.client_ca}) {}

absl::Status TlsContext::Load() {
  watched_.Changed();
  if (absl::Status status = CheckTlsFiles(files_); !status.ok()) return status;
  auto context = std::make_shared<ssl::context>(ssl::context::tls_server);
  SSL_CTX* const native = context->native_handle();
  SSL_CTX_set_min_proto_version(native, TLS1_2_VERSION);
  SSL_CTX_set_options(native, SSL_OP_NO_RENEGOTIATION);
  SSL_CTX_set_session_id_context(native, kSessionContext, sizeof kSessionContext);
  // An idle connection holds no buffers.
  SSL_CTX_set_mode(native, SSL_MODE_RELEASE_BUFFERS);
  error_code ec;
  const char* flag = "--ssl-certfile";
  context->use_certificate_chain_file(files_.certificate, ec);
  if (!ec) {
    flag = "--ssl-keyfile";
    context->use_private_key_file(files_.key, ssl::context::pem, ec);
  }
  if (!ec && !files_.client_ca.empty()) {
    flag = "--ssl-ca-certs";
    context->load_verify_file(files_.client_ca, ec);
    if (!ec) context->set_verify_mode(ssl::verify_peer | ssl::verify_fail_if_no_peer_cert, ec);
    SSL_CTX_set_client_CA_list(native, SSL_load_client_CA_file(files_.client_ca.c_str()));
  }
  if (ec) return absl::InvalidArgumentError(absl::StrCat(flag, ": ", ec.message()));
  context_ = std::move(context);
  return absl::OkStatus();
}

std::shared_ptr<ssl::context> TlsContext::Current() {
  if (watched_.Changed()) {
    if (absl::Status status = Load(); status.ok()) {
      LogInfo("http: the certificates have changed and were read again");
    } else {
      LogWarning(absl::StrCat("http: ", std::string(status.message()),
                              "; the certificates stay as they were"));
    }
  }
  return context_;
}

}  // namespace lockstep
