#include "cli/server_access.h"

#include "CLI/CLI.hpp"

namespace lockstep {

void AddAccessFlags(CLI::App* app, ServerAccess* access) {
  const std::string group = "Access";
  app->add_flag("--tls", access->tls, "Talk TLS, and trust the system's authorities")
      ->group(group)
      ->envname("LOCKSTEP_CLIENT_TLS");
  app->add_option("--ssl-ca-certs", access->ca_certs,
                  "Talk TLS, and trust these PEM certificates alone")
      ->group(group)
      ->envname("LOCKSTEP_CLIENT_SSL_CA_CERTS")
      ->check(CLI::ExistingFile);
  CLI::Option* const certificate =
      app->add_option("--ssl-certfile", access->certificate,
                      "PEM certificate to show to a server that asks for one")
          ->group(group)
          ->envname("LOCKSTEP_CLIENT_SSL_CERTFILE")
          ->check(CLI::ExistingFile);
  CLI::Option* const key = app->add_option("--ssl-keyfile", access->key, "Its PEM key")
                               ->group(group)
                               ->envname("LOCKSTEP_CLIENT_SSL_KEYFILE")
                               ->check(CLI::ExistingFile);
  certificate->needs(key);
  key->needs(certificate);
  app->add_option("--api-key", access->api_key, "Sent as 'Authorization: Bearer KEY'")
      ->group(group)
      ->envname("LOCKSTEP_API_KEY");
}

}  // namespace lockstep
