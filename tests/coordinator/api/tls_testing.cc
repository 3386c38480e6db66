#include "tests/coordinator/api/tls_testing.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <openssl/ssl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

namespace lockstep {

void CertificateFolder::Write(const std::string& name, const std::string& text) const {
  std::ofstream(Path(name), std::ios::trunc | std::ios::binary) << text;
}

std::string CertificateFolder::Read(const std::string& name) const {
  std::ifstream in(Path(name), std::ios::binary);
  EXPECT_TRUE(in.good()) << name;
  return std::string(std::istreambuf_iterator<char>(in), {});
}

void CertificateFolder::Run(const std::string& arguments) const {
  const std::string command =
      "cd " + folder_.path() + " && openssl " + arguments + " 2>openssl.log";
  ASSERT_EQ(std::system(command.c_str()), 0) << command << "\n" << Read("openssl.log");
}

void CertificateFolder::MakeAuthority(const std::string& name) const {
  Run("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=" + name +
      " -keyout " + name + ".key -out " + name + ".pem");
}

void CertificateFolder::MakeCertificate(const std::string& name, const std::string& authority,
                                        int days, const std::string& names) const {
  Run("req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=" + name + " -keyout " +
      name + ".key -out " + name + ".csr");
  Write("names", "subjectAltName=" + names + "\n");
  Run("x509 -req -in " + name + ".csr -CA " + authority + ".pem -CAkey " + authority +
      ".key -CAcreateserial -extfile names -days " + std::to_string(days) + " -out " + name +
      ".pem");
}

void CertificateFolder::Replace(const std::string& from, const std::string& to) const {
  for (const char* end : {".key", ".pem"}) {
    std::filesystem::copy_file(Path(from + end), Path("next"));
    std::filesystem::rename(Path("next"), Path(to + end));
  }
}

struct TlsClient::Impl {
  SSL_CTX* context = nullptr;
  SSL* ssl = nullptr;
  int fd = -1;
  bool connected = false;
  bool orderly = false;
  std::string buffer;
};

TlsClient::TlsClient(int port, const std::string& authority, const std::string& certificate,
                     const std::string& key)
    : impl_(std::make_unique<Impl>()) {
  impl_->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const timeval limit{.tv_sec = 20, .tv_usec = 0};
  setsockopt(impl_->fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(static_cast<uint16_t>(port));
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(impl_->fd, reinterpret_cast<sockaddr*>(&to), sizeof to) != 0) return;
  impl_->context = SSL_CTX_new(TLS_client_method());
  EXPECT_EQ(SSL_CTX_load_verify_locations(impl_->context, authority.c_str(), nullptr), 1);
  SSL_CTX_set_verify(impl_->context, SSL_VERIFY_PEER, nullptr);
  if (!certificate.empty()) {
    EXPECT_EQ(SSL_CTX_use_certificate_chain_file(impl_->context, certificate.c_str()), 1);
    EXPECT_EQ(SSL_CTX_use_PrivateKey_file(impl_->context, key.c_str(), SSL_FILETYPE_PEM), 1);
  }
  impl_->ssl = SSL_new(impl_->context);
  SSL_set_fd(impl_->ssl, impl_->fd);
  impl_->connected = SSL_connect(impl_->ssl) == 1;
}

TlsClient::~TlsClient() {
  Close();
  SSL_free(impl_->ssl);
  SSL_CTX_free(impl_->context);
}

void TlsClient::Close() {
  if (impl_->fd >= 0) close(impl_->fd);
  impl_->fd = -1;
}

bool TlsClient::connected() const { return impl_->connected; }

std::string TlsClient::server_name() const {
  X509* const certificate = SSL_get1_peer_certificate(impl_->ssl);
  if (certificate == nullptr) return {};
  char name[64] = {};
  X509_NAME_get_text_by_NID(X509_get_subject_name(certificate), NID_commonName, name, sizeof name);
  X509_free(certificate);
  return name;
}

bool TlsClient::Send(const std::string& bytes) {
  return connected() && SSL_write(impl_->ssl, bytes.data(), static_cast<int>(bytes.size())) > 0;
}

bool TlsClient::Fill() {
  char bytes[4096];
  const int count = connected() ? SSL_read(impl_->ssl, bytes, sizeof bytes) : -1;
  if (count > 0) {
    impl_->buffer.append(bytes, static_cast<size_t>(count));
    return true;
  }
  impl_->orderly = connected() && SSL_get_error(impl_->ssl, count) == SSL_ERROR_ZERO_RETURN;
  return false;
}

bool TlsClient::WaitFor(const std::string& text) {
  while (impl_->buffer.find(text) == std::string::npos) {
    if (!Fill()) return false;
  }
  return true;
}

bool TlsClient::Take(const std::string& text) {
  if (!WaitFor(text)) return false;
  impl_->buffer.erase(0, impl_->buffer.find(text) + text.size());
  return true;
}

std::string TlsClient::ReadToEnd(bool* orderly) {
  while (Fill()) {
  }
  if (orderly != nullptr) *orderly = impl_->orderly;
  return std::exchange(impl_->buffer, {});
}

}  // namespace lockstep
