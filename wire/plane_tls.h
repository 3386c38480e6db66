// TLS of the workers' plane, both ends: each shows a certificate that the other's
// --worker-ssl-ca-certs signed and that names its role among its DNS names, so
// that a worker's certificate serves no coordinator and the other way round. One
// certificate may name both. Hosts are not named: workers come from anywhere.
//
// The coordinator looks at its files every second, a worker reads them at every
// dial; streams that are open go on. Thread-safe.
#ifndef LOCKSTEP_WIRE_PLANE_TLS_H_
#define LOCKSTEP_WIRE_PLANE_TLS_H_

#include <grpcpp/security/auth_context.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/tls_files.h"

namespace lockstep {

// All three files, or none; one line that names the flag and the file.
absl::Status CheckPlaneTls(const TlsFiles& tls);

// Plain text where there are no files.
std::shared_ptr<grpc::ServerCredentials> PlaneServerCredentials(const TlsFiles& tls);
// Reads the files. The arguments learn what name the coordinator must have.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> PlaneChannelCredentials(
    const TlsFiles& tls, grpc::ChannelArguments* arguments);

// Of a call that came through PlaneServerCredentials: whether the certificate is
// a worker's.
bool IsWorker(const grpc::AuthContext& context);

}  // namespace lockstep

#endif  // LOCKSTEP_WIRE_PLANE_TLS_H_
