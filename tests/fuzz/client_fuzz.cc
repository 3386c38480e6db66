// What the command line reads that others wrote: a line of a batch file, and a
// server's metrics page. The first byte says which.
#include <string>

#include "cli/batch_job.h"
#include "cli/top/metrics_text.h"
#include "common/check.h"
#include "tests/fuzz/fuzz_input.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace lockstep;
  fuzz::Input input(data, size);
  if (input.Byte() == 'm') {
    const MetricsText text = MetricsText::Parse(input.Rest());
    (void)text.Value("a", {{"b", "c"}});
    for (const std::string& value : text.LabelValues("a", "b")) (void)text.Label("a", value);
    return 0;
  }
  const BatchItem item = ParseBatchLine(std::string(input.Rest()), 1);
  LOCKSTEP_CHECK(!item.custom_id.empty());
  if (!item.error.ok()) fuzz::RequireRefusal(item.error);
  (void)ErrorLine(item.custom_id, item.error);
  return 0;
}
