#include "common/tls_files.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <cstdio>
#include <memory>

#include "absl/strings/str_cat.h"

namespace lockstep {
namespace {

template <typename T, void (*kFree)(T*)>
struct Freer {
  void operator()(T* value) const { kFree(value); }
};
using Certificate = std::unique_ptr<X509, Freer<X509, X509_free>>;
using PrivateKey = std::unique_ptr<EVP_PKEY, Freer<EVP_PKEY, EVP_PKEY_free>>;
struct FileCloser {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, FileCloser>;

absl::Status Bad(const std::string& flag, const std::string& path, const std::string& what) {
  ERR_clear_error();
  return absl::InvalidArgumentError(absl::StrCat(flag, " ", path, ": ", what));
}

// A server has nobody to type a passphrase.
int NoPassphrase(char*, int, int, void*) { return 0; }

absl::Status ReadCertificate(const std::string& flag, const std::string& path, Certificate* out) {
  const File file(std::fopen(path.c_str(), "re"));
  if (file == nullptr) return Bad(flag, path, "cannot be read");
  out->reset(PEM_read_X509(file.get(), nullptr, NoPassphrase, nullptr));
  if (*out == nullptr) return Bad(flag, path, "no PEM certificate in it");
  if (X509_cmp_current_time(X509_get0_notAfter(out->get())) < 0) {
    return Bad(flag, path, "the certificate has expired; renew it");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckTlsFiles(const TlsFiles& files, std::string_view flags) {
  const std::string prefix(flags);
  const std::string certificate_flag = prefix + "-certfile", key_flag = prefix + "-keyfile",
                    ca_flag = prefix + "-ca-certs";
  if (!files.enabled()) {
    if (files.key.empty() && files.client_ca.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(
        files.key.empty() ? ca_flag : key_flag, ": needs ", certificate_flag, " and ", key_flag));
  }
  if (files.key.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(certificate_flag, ": needs ", key_flag, " as well"));
  }
  Certificate certificate;
  absl::Status status = ReadCertificate(certificate_flag, files.certificate, &certificate);
  if (!status.ok()) return status;
  const File file(std::fopen(files.key.c_str(), "re"));
  if (file == nullptr) return Bad(key_flag, files.key, "cannot be read");
  const PrivateKey key(PEM_read_PrivateKey(file.get(), nullptr, NoPassphrase, nullptr));
  if (key == nullptr) return Bad(key_flag, files.key, "no PEM key without a passphrase in it");
  if (X509_check_private_key(certificate.get(), key.get()) != 1) {
    return Bad(key_flag, files.key, absl::StrCat("is not the key of ", certificate_flag));
  }
  if (files.client_ca.empty()) return absl::OkStatus();
  Certificate authority;
  return ReadCertificate(ca_flag, files.client_ca, &authority);
}

}  // namespace lockstep
