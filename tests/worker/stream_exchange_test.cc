#include "worker/stream_exchange.h"

#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "wire/protocol.h"

namespace lockstep {
namespace {

using worker::v1::CommKey;
using worker::v1::WorkerMessage;

CommKey Key(const std::string& key, const std::string& value) {
  CommKey message;
  message.set_key(key);
  message.set_value(value);
  return message;
}

TEST(StreamExchange, PublishesWithItsEpoch) {
  std::vector<WorkerMessage> sent;
  StreamExchange exchange(7, [&](const WorkerMessage& m) { sent.push_back(m); });
  ASSERT_TRUE(exchange.Publish("rank/0", std::string("a\0b", 3)).ok());
  ASSERT_EQ(sent.size(), 1u);
  EXPECT_EQ(sent[0].comm_key().epoch(), 7u);
  EXPECT_EQ(sent[0].comm_key().key(), "rank/0");
  EXPECT_EQ(sent[0].comm_key().value(), std::string("a\0b", 3));
  EXPECT_FALSE(exchange.Publish("k", std::string(wire::kMaxCommValueBytes + 1, 'x')).ok());
  EXPECT_FALSE(exchange.Publish(std::string(wire::kMaxCommKeyBytes + 1, 'k'), "").ok());
  EXPECT_EQ(sent.size(), 1u);
}

TEST(StreamExchange, AwaitsWhatIsDeliveredLaterOrWas) {
  StreamExchange exchange(1, [](const WorkerMessage&) {});
  ASSERT_TRUE(exchange.Deliver(Key("early", "1")));
  EXPECT_EQ(*exchange.Await("early"), "1");
  std::string late;
  std::thread waiting([&] { late = *exchange.Await("late"); });
  ASSERT_TRUE(exchange.Deliver(Key("late", "2")));
  waiting.join();
  EXPECT_EQ(late, "2");
}

TEST(StreamExchange, CancelEndsEveryWait) {
  StreamExchange exchange(1, [](const WorkerMessage&) {});
  absl::Status status;
  std::thread waiting([&] { status = exchange.Await("never").status(); });
  exchange.Cancel();
  waiting.join();
  EXPECT_TRUE(absl::IsAborted(status));
  EXPECT_TRUE(absl::IsAborted(exchange.Await("never").status()));
}

TEST(StreamExchange, RefusesMoreThanTheProtocolAllows) {
  StreamExchange exchange(1, [](const WorkerMessage&) {});
  EXPECT_FALSE(exchange.Deliver(Key("k", std::string(wire::kMaxCommValueBytes + 1, 'x'))));
  EXPECT_FALSE(exchange.Deliver(Key(std::string(wire::kMaxCommKeyBytes + 1, 'k'), "")));
  for (int i = 0; i < wire::kMaxCommKeys; ++i) {
    ASSERT_TRUE(exchange.Deliver(Key(std::to_string(i), "")));
  }
  EXPECT_FALSE(exchange.Deliver(Key("one more", "")));
}

}  // namespace
}  // namespace lockstep
