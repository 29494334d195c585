// Packed weights made at load, one copy for all sessions of the process that hold equal ones.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace splitq {

using SharedPayload = std::shared_ptr<const std::vector<uint8_t>>;

// The payload, or one of the same bytes that somebody still holds. Any thread may call it.
SharedPayload Share(std::vector<uint8_t> payload);

}  // namespace splitq
