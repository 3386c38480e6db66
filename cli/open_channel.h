// gRPC channels of the commands: TLS and the API key as ServerAccess says.
#ifndef LOCKSTEP_CLI_OPEN_CHANNEL_H_
#define LOCKSTEP_CLI_OPEN_CHANNEL_H_

#include <grpcpp/channel.h>
#include <grpcpp/support/channel_arguments.h>

#include <memory>
#include <string>

#include "cli/server_access.h"

namespace lockstep {

// Every call of the channel carries the key. A file that cannot be read by now
// fails the calls.
std::shared_ptr<grpc::Channel> OpenChannel(const std::string& address, const ServerAccess& access,
                                           const grpc::ChannelArguments& arguments);

}  // namespace lockstep

#endif  // LOCKSTEP_CLI_OPEN_CHANNEL_H_
