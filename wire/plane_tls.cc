#include "wire/plane_tls.h"

#include <grpc/grpc_security_constants.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <string>

#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

constexpr char kFlags[] = "--worker-ssl";
constexpr char kCoordinatorName[] = "lockstep-coordinator";
constexpr char kWorkerName[] = "lockstep-worker";
constexpr unsigned int kRefreshSeconds = 1;

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

}  // namespace

absl::Status CheckPlaneTls(const TlsFiles& tls) {
  if (absl::Status status = CheckTlsFiles(tls, kFlags); !status.ok()) return status;
  if (tls.enabled() && tls.client_ca.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(kFlags, "-certfile: needs ", kFlags,
                     "-ca-certs as well: each side asks for the other's certificate"));
  }
  return absl::OkStatus();
}

std::shared_ptr<grpc::ServerCredentials> PlaneServerCredentials(const TlsFiles& tls) {
  if (!tls.enabled()) return grpc::InsecureServerCredentials();
  namespace experimental = grpc::experimental;
  experimental::TlsServerCredentialsOptions options(
      std::make_shared<experimental::FileWatcherCertificateProvider>(
          tls.key, tls.certificate, tls.client_ca, kRefreshSeconds));
  options.watch_identity_key_cert_pairs();
  options.watch_root_certs();
  options.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  return experimental::TlsServerCredentials(options);
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> PlaneChannelCredentials(
    const TlsFiles& tls, grpc::ChannelArguments* arguments) {
  if (!tls.enabled()) return grpc::InsecureChannelCredentials();
  if (absl::Status status = CheckPlaneTls(tls); !status.ok()) return status;
  arguments->SetSslTargetNameOverride(kCoordinatorName);
  return grpc::SslCredentials({.pem_root_certs = ReadFile(tls.client_ca),
                               .pem_private_key = ReadFile(tls.key),
                               .pem_cert_chain = ReadFile(tls.certificate)});
}

bool IsWorker(const grpc::AuthContext& context) {
  const auto names = context.FindPropertyValues(GRPC_PEER_DNS_PROPERTY_NAME);
  return context.IsPeerAuthenticated() &&
         std::any_of(names.begin(), names.end(),
                     [](const grpc::string_ref& name) { return name == kWorkerName; });
}

}  // namespace lockstep
