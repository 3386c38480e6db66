#include "common/service_manager.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace lockstep {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

// What systemd is to a service: a datagram socket and three variables.
class Manager {
 public:
  // `name` as in NOTIFY_SOCKET.
  explicit Manager(std::string name) : name_(std::move(name)) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, name_.data(), name_.size());
    if (name_[0] == '@') address.sun_path[0] = '\0';
    fd_ = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    const socklen_t length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name_.size());
    EXPECT_EQ(bind(fd_, reinterpret_cast<const sockaddr*>(&address), length), 0);
    setenv("NOTIFY_SOCKET", name_.c_str(), 1);
  }
  ~Manager() {
    close(fd_);
    if (name_[0] == '/') unlink(name_.c_str());
  }

  // All that has been sent; a datagram is there once send has returned.
  std::vector<std::string> Heard() const {
    std::vector<std::string> heard;
    char buffer[512];
    for (ssize_t n; (n = recv(fd_, buffer, sizeof(buffer), MSG_DONTWAIT)) >= 0;) {
      heard.emplace_back(buffer, static_cast<size_t>(n));
    }
    return heard;
  }

 private:
  const std::string name_;
  int fd_ = -1;
};

class ServiceManagerTest : public ::testing::Test {
 protected:
  void TearDown() override {
    for (const char* variable : {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}) {
      unsetenv(variable);
    }
  }
  const std::string path_ = ::testing::TempDir() + "/notify." + std::to_string(getpid());
  const std::string abstract_ = "@lockstep-notify-test." + std::to_string(getpid());
};

TEST_F(ServiceManagerTest, SaysReadyAndStoppingOnceEach) {
  for (const std::string& name : {path_, abstract_}) {
    const Manager manager(name);
    ServiceManager service;
    service.Status("loading\nREADY=1");
    service.Ready();
    service.Ready();
    service.Stopping();
    service.Stopping();
    EXPECT_THAT(manager.Heard(),
                ElementsAre("STATUS=loading", "READY=1\nSTATUS=ready", "STOPPING=1\nSTATUS=ending"))
        << name;
  }
}

TEST_F(ServiceManagerTest, ChildrenDoNotInheritTheAddress) {
  const Manager manager(path_);
  setenv("WATCHDOG_USEC", "1000000", 1);
  setenv("WATCHDOG_PID", std::to_string(getpid()).c_str(), 1);
  const ServiceManager service;
  EXPECT_EQ(getenv("NOTIFY_SOCKET"), nullptr);
  EXPECT_EQ(getenv("WATCHDOG_USEC"), nullptr);
  EXPECT_EQ(getenv("WATCHDOG_PID"), nullptr);
}

TEST_F(ServiceManagerTest, BeatsWithinTheWatchdogsTimeAndNotAtEveryCall) {
  const Manager manager(path_);
  setenv("WATCHDOG_USEC", "600000000", 1);
  ServiceManager service;
  EXPECT_EQ(service.MsUntilBeat(), 0);
  service.Beat();
  service.Beat();
  EXPECT_THAT(manager.Heard(), ElementsAre("WATCHDOG=1"));
  EXPECT_GT(service.MsUntilBeat(), 100'000);
  EXPECT_LE(service.MsUntilBeat(), 200'000);
}

TEST_F(ServiceManagerTest, BeatsAgainWhenItIsDue) {
  const Manager manager(path_);
  setenv("WATCHDOG_USEC", "30000", 1);  // every 10 ms
  ServiceManager service;
  service.Beat();
  poll(nullptr, 0, static_cast<int>(service.MsUntilBeat()) + 1);
  EXPECT_EQ(service.MsUntilBeat(), 0);
  service.Beat();
  EXPECT_THAT(manager.Heard(), ElementsAre("WATCHDOG=1", "WATCHDOG=1"));
}

TEST_F(ServiceManagerTest, LeavesTheWatchdogOfAnotherProcessAlone) {
  for (const char* pid : {"1", "none"}) {
    const Manager manager(path_);
    setenv("WATCHDOG_USEC", "1000000", 1);
    setenv("WATCHDOG_PID", pid, 1);
    ServiceManager service;
    EXPECT_EQ(service.MsUntilBeat(), -1) << pid;
    service.Beat();
    EXPECT_THAT(manager.Heard(), IsEmpty()) << pid;
  }
}

TEST_F(ServiceManagerTest, GoesOnWithoutAManager) {
  const std::string too_long = "/" + std::string(108, 'x');
  for (const std::string& name : {std::string(), std::string("relative"), std::string("vsock:2:1"),
                                  std::string("/no/such/socket"), too_long}) {
    setenv("NOTIFY_SOCKET", name.c_str(), 1);
    setenv("WATCHDOG_USEC", "not a number", 1);
    ServiceManager service;
    service.Ready();
    service.Beat();
    EXPECT_EQ(service.MsUntilBeat(), -1) << name;
    service.Stopping();
  }
}

}  // namespace
}  // namespace lockstep
