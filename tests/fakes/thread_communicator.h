// A communicator among threads of one process: the ranks of a tensor-parallel
// group as threads of a test. Sums as the contract says (a binary tree over rank
// order), counts its calls, and checks that every rank makes the same ones: a
// mismatch fails on all ranks and names both calls.
//
//   auto ranks = MakeThreadCommunicators(4);
//   std::thread t([&] { Use(ranks[1].get()); });
#ifndef LOCKSTEP_TESTS_FAKES_THREAD_COMMUNICATOR_H_
#define LOCKSTEP_TESTS_FAKES_THREAD_COMMUNICATOR_H_

#include <memory>
#include <vector>

#include "worker/comm/communicator.h"

namespace lockstep {

std::vector<std::unique_ptr<Communicator>> MakeThreadCommunicators(int size);

}  // namespace lockstep

#endif  // LOCKSTEP_TESTS_FAKES_THREAD_COMMUNICATOR_H_
