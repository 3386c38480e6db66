#include "worker/comm/gloo_plugin.h"

#include "worker/comm/gloo_communicator.h"

extern "C" __attribute__((visibility("default"))) lockstep::RankCommunicator*
lockstep_make_gloo_communicator(const lockstep::CommunicatorOptions* options) {
  return lockstep::MakeGlooCommunicator(*options).release();
}
