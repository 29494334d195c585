#include "pack/shared_payload.h"

#include <map>
#include <mutex>
#include <utility>

#include "pack/checksum.h"

namespace splitq {
namespace {

class Payloads {
 public:
  SharedPayload Share(std::vector<uint8_t> payload) {
    const uint32_t checksum = Crc32(payload.data(), payload.size());
    const std::lock_guard<std::mutex> lock(mutex_);
    RemoveUnused();
    const auto [first, last] = known_.equal_range(checksum);
    for (auto entry = first; entry != last; ++entry) {
      SharedPayload known = entry->second.lock();
      if (known != nullptr && *known == payload) return known;
    }
    auto shared = std::make_shared<const std::vector<uint8_t>>(std::move(payload));
    known_.emplace(checksum, shared);
    return shared;
  }

 private:
  void RemoveUnused() {
    for (auto entry = known_.begin(); entry != known_.end();) {
      entry = entry->second.expired() ? known_.erase(entry) : std::next(entry);
    }
  }

  std::mutex mutex_;
  std::multimap<uint32_t, std::weak_ptr<const std::vector<uint8_t>>> known_;  // by checksum
};

}  // namespace

SharedPayload Share(std::vector<uint8_t> payload) {
  static Payloads& payloads = *new Payloads;  // outlives every session
  return payloads.Share(std::move(payload));
}

}  // namespace splitq
