// Equal payloads are held once, by whatever thread they come.
#include <thread>
#include <vector>

#include "pack/shared_payload.h"
#include "tests.h"

namespace splitq::test {

void TestPayloads(Report& report) {
  const std::vector<uint8_t> bytes(1000, 7), other(1000, 8), longer(1001, 7);
  SharedPayload first = Share(bytes);
  report.Check(*first == bytes && Share(bytes) == first, "equal payloads are one");
  report.Check(Share(other) != first && Share(longer) != first, "other payloads are others");
  report.Check(*Share({}) == std::vector<uint8_t>(), "an empty payload");
  const std::weak_ptr<const std::vector<uint8_t>> watch = first;
  first.reset();
  report.Check(watch.expired(), "a payload that nobody holds is freed");

  std::vector<SharedPayload> shared(8);
  std::vector<std::thread> threads;
  for (SharedPayload& mine : shared) {
    threads.emplace_back([&] {
      for (int round = 0; round < 100; ++round) mine = Share(bytes);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const SharedPayload& each : shared) {
    report.Check(each == shared.front() && *each == bytes, "payloads of threads are one");
  }
}

}  // namespace splitq::test
