#include "worker/comm/local_address.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace lockstep {
namespace {

using ::testing::HasSubstr;

TEST(LocalAddress, IsWhereTheRouteToTheCoordinatorStarts) {
  const std::pair<const char*, const char*> cases[] = {{"unix:/run/lockstep.sock", "127.0.0.1"},
                                                       {"unix-abstract:name", "127.0.0.1"},
                                                       {"127.0.0.1:50052", "127.0.0.1"},
                                                       {"localhost:50052", "127.0.0.1"},
                                                       {"dns:///localhost:50052", "127.0.0.1"},
                                                       {"ipv4:127.0.0.1:50052", "127.0.0.1"},
                                                       {"127.0.0.1", "127.0.0.1"}};
  for (const auto& [target, expected] : cases) {
    const auto local = LocalAddressTowards(target);
    ASSERT_TRUE(local.ok()) << target << ": " << local.status();
    EXPECT_EQ(*local, expected) << target;
  }
}

TEST(LocalAddress, NamesTheTargetThatLeadsNowhere) {
  for (const char* target : {"no-such-host.invalid:1", ":50052", "", "[]:1", "host:"}) {
    const auto local = LocalAddressTowards(target);
    ASSERT_FALSE(local.ok()) << target;
    EXPECT_THAT(std::string(local.status().message()),
                HasSubstr("address \"" + std::string(target) + "\""));
  }
}

}  // namespace
}  // namespace lockstep
