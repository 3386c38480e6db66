// How commands show who they are to a server that somebody else started, and know
// it: TLS files and an API key. One set of flags for every command that talks to
// one; each has an environment variable, so that a key is on no command line.
//
//   AddAccessFlags(app, &flags->access);
//   Client client(address, flags->access);
#ifndef LOCKSTEP_CLI_SERVER_ACCESS_H_
#define LOCKSTEP_CLI_SERVER_ACCESS_H_

#include <string>

namespace CLI {
class App;
}

namespace lockstep {

struct ServerAccess {
  bool tls = false;         // --tls: the system's authorities
  std::string ca_certs;     // --ssl-ca-certs: these instead; means --tls
  std::string certificate;  // --ssl-certfile: where the server asks for one
  std::string key;          // --ssl-keyfile
  std::string api_key;      // --api-key

  bool use_tls() const { return tls || !ca_certs.empty() || !certificate.empty(); }
};

void AddAccessFlags(CLI::App* app, ServerAccess* access);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_SERVER_ACCESS_H_
