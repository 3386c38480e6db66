// The file of --api-key-file, and what a caller sends as its key (up to the first
// newline).
#include "common/check.h"
#include "coordinator/api/api_keys.h"
#include "coordinator/api/trace.h"
#include "tests/fuzz/fuzz_input.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep;
  static const fuzz::ScratchDir dir;
  fuzz::Input input(data, size);
  const std::string_view authorization = input.Until('\n');
  (void)IsTraceparent(authorization);
  const std::string path = dir.Write("keys", input.Rest());
  const auto keys = ApiKeys::Load(path);
  if (!keys.ok()) {
    fuzz::RequireRefusal(keys.status());
    return 0;
  }
  const absl::Status checked = (*keys)->Check(authorization);
  LOCKSTEP_CHECK(checked.ok() || absl::IsUnauthenticated(checked));
  // Nobody is let in without the word before the key.
  if (checked.ok()) LOCKSTEP_CHECK(authorization.size() > 7);
  return 0;
}
