// Certificates made for one test by the openssl program, and a TLS client of
// bytes whose reads are bounded in time.
#ifndef LOCKSTEP_TESTS_COORDINATOR_API_TLS_TESTING_H_
#define LOCKSTEP_TESTS_COORDINATOR_API_TLS_TESTING_H_

#include <memory>
#include <string>

#include "common/tls_files.h"
#include "tests/fakes/temp_dir.h"

namespace lockstep {

// A folder of its own, gone at the end.
class CertificateFolder {
 public:
  std::string Path(const std::string& name) const { return folder_.File(name); }
  void Write(const std::string& name, const std::string& text) const;
  std::string Read(const std::string& name) const;
  // NAME.pem and NAME.key: an authority.
  void MakeAuthority(const std::string& name) const;
  // NAME.pem and NAME.key: signed by `authority`, for 127.0.0.1 and localhost
  // unless other names are given.
  void MakeCertificate(const std::string& name, const std::string& authority, int days = 1,
                       const std::string& names = "IP:127.0.0.1,DNS:localhost") const;
  // Renames copies of FROM over TO, the way certificates are renewed.
  void Replace(const std::string& from, const std::string& to) const;

 private:
  void Run(const std::string& arguments) const;

  TempDir folder_;
};

class TlsClient {
 public:
  // Trusts `authority` alone; shows a certificate where `certificate` is given.
  TlsClient(int port, const std::string& authority, const std::string& certificate = "",
            const std::string& key = "");
  ~TlsClient();
  TlsClient(const TlsClient&) = delete;
  TlsClient& operator=(const TlsClient&) = delete;

  bool connected() const;           // the server's certificate was right
  std::string server_name() const;  // its common name
  bool Send(const std::string& bytes);
  // Until `text` has come, the end, or 20 s.
  bool WaitFor(const std::string& text);
  // The same, and forgets everything up to there.
  bool Take(const std::string& text);
  // All until the server ends; whether it said so in TLS's own words.
  std::string ReadToEnd(bool* orderly = nullptr);
  void Close();

 private:
  struct Impl;
  bool Fill();
  std::unique_ptr<Impl> impl_;
};

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_COORDINATOR_API_TLS_TESTING_H_
