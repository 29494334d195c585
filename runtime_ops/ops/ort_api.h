// The ONNX Runtime C API as this library uses it: through the table handed in at registration, so
// there is no link to the runtime and two runtimes may share the process.
#pragma once

#include <onnxruntime_c_api.h>

#include <cstddef>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

namespace splitq::ops {

// Asked for whatever the headers are, so that newer headers do not shut out older runtimes.
inline constexpr uint32_t kApiVersion = 21;
inline constexpr char kNeededRuntime[] = "1.21";
static_assert(ORT_API_VERSION >= kApiVersion, "expected the headers of onnxruntime 1.21 or newer");

// Exceptions carry errors inside ops/ only; Guarded() turns them into a status.
class OpError : public std::runtime_error {
 public:
  explicit OpError(const std::string& message, OrtErrorCode code = ORT_INVALID_ARGUMENT)
      : std::runtime_error(message), code_(code) {}
  OrtErrorCode code() const { return code_; }

 private:
  OrtErrorCode code_;
};

inline void Check(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return;
  const OpError error(api.GetErrorMessage(status), api.GetErrorCode(status));
  api.ReleaseStatus(status);
  throw error;
}

// For questions whose answer may be no.
inline bool Succeeded(const OrtApi& api, OrtStatus* status) {
  if (status != nullptr) api.ReleaseStatus(status);
  return status == nullptr;
}

template <typename Body>
OrtStatus* Guarded(const OrtApi& api, const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const OpError& error) {
    return api.CreateStatus(error.code(), error.what());
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ORT_FAIL, "ai.splitq: out of memory");
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, error.what());
  } catch (...) {
    return api.CreateStatus(ORT_FAIL, "ai.splitq: unknown error");
  }
}

// A string that the API copies out in two calls: get(buffer, &size), size with the final zero.
template <typename Get>
std::string ReadString(const OrtApi& api, const Get& get) {
  size_t size = 0;
  Check(api, get(nullptr, &size));
  std::string text(size, '\0');
  Check(api, get(text.data(), &size));
  text.resize(size > 0 ? size - 1 : 0);
  return text;
}

using ShapeInfo =
    std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(OrtApi::ReleaseTensorTypeAndShapeInfo)>;

inline ShapeInfo Own(const OrtApi& api, OrtTensorTypeAndShapeInfo* info) {
  return ShapeInfo(info, api.ReleaseTensorTypeAndShapeInfo);
}

}  // namespace splitq::ops
