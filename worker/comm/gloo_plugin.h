// Between a statically linked worker (LOCKSTEP_STATIC) and gloo, which distributions
// have as a shared library alone: everything that calls gloo is in a file of its own,
// opened when a group of several processes on the cpu backend forms. A worker on GPUs,
// or alone, does without it. Both files are of one build.
#ifndef LOCKSTEP_WORKER_COMM_GLOO_PLUGIN_H_
#define LOCKSTEP_WORKER_COMM_GLOO_PLUGIN_H_

#include "worker/comm/rank_communicator.h"

namespace lockstep {

inline constexpr char kGlooPluginFile[] = "liblockstep-gloo.so";
inline constexpr char kMakeGlooSymbol[] = "lockstep_make_gloo_communicator";
// The caller owns the result.
using MakeGlooFunction = RankCommunicator* (*)(const CommunicatorOptions*);

}  // namespace lockstep

#endif  // LOCKSTEP_WORKER_COMM_GLOO_PLUGIN_H_
