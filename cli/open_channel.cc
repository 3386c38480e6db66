#include "cli/open_channel.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/client_interceptor.h>

#include <fstream>
#include <iterator>
#include <utility>
#include <vector>

namespace lockstep {
namespace {

namespace experimental = grpc::experimental;

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// gRPC's own call credentials refuse to be sent in plain text, where a key may
// stand for a team on a host that is trusted.
class KeySender final : public experimental::Interceptor {
 public:
  explicit KeySender(std::string authorization) : authorization_(std::move(authorization)) {}
  void Intercept(experimental::InterceptorBatchMethods* methods) override {
    using experimental::InterceptionHookPoints;
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      methods->GetSendInitialMetadata()->emplace("authorization", authorization_);
    }
    methods->Proceed();
  }

 private:
  const std::string authorization_;
};

class KeySenders final : public experimental::ClientInterceptorFactoryInterface {
 public:
  explicit KeySenders(const std::string& key) : authorization_("Bearer " + key) {}
  experimental::Interceptor* CreateClientInterceptor(experimental::ClientRpcInfo*) override {
    return new KeySender(authorization_);
  }

 private:
  const std::string authorization_;
};

}  // namespace

std::shared_ptr<grpc::Channel> OpenChannel(const std::string& address, const ServerAccess& access,
                                           const grpc::ChannelArguments& arguments) {
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  if (access.use_tls()) {
    grpc::SslCredentialsOptions tls;
    if (!access.ca_certs.empty()) tls.pem_root_certs = ReadFile(access.ca_certs);
    if (!access.certificate.empty()) {
      tls.pem_cert_chain = ReadFile(access.certificate);
      tls.pem_private_key = ReadFile(access.key);
    }
    credentials = grpc::SslCredentials(tls);
  }
  std::vector<std::unique_ptr<experimental::ClientInterceptorFactoryInterface>> interceptors;
  if (!access.api_key.empty()) interceptors.push_back(std::make_unique<KeySenders>(access.api_key));
  return experimental::CreateCustomChannelWithInterceptors(address, credentials, arguments,
                                                           std::move(interceptors));
}

}  // namespace lockstep
