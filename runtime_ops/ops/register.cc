// The one function that the library exports.
#include <list>
#include <mutex>
#include <string>

#include "ops/channel_split_op.h"
#include "ops/correction_op.h"
#include "ops/split_linear_op.h"

#if defined(_WIN32)
#define SPLITQ_EXPORT __declspec(dllexport)
#else
#define SPLITQ_EXPORT __attribute__((visibility("default")))
#endif

namespace splitq::ops {
namespace {

// The ops as one runtime sees them. Sessions keep pointers, so this lives as long as the process.
struct Domain {
  explicit Domain(const OrtApi& runtime)
      : api(runtime), linear(runtime), channel_split(runtime), correction(runtime) {
    Check(api, api.CreateCustomOpDomain("ai.splitq", &handle));
    for (const OrtCustomOp* op :
         std::initializer_list<const OrtCustomOp*>{&linear, &channel_split, &correction}) {
      Check(api, api.CustomOpDomain_Add(handle, op));
    }
  }

  const OrtApi& api;
  CustomOp<SplitLinearKernel> linear;
  CustomOp<ChannelSplitKernel> channel_split;
  CustomOp<CorrectionKernel> correction;
  OrtCustomOpDomain* handle = nullptr;
};

// One domain a runtime: a process may have loaded two of different versions.
OrtCustomOpDomain* DomainOf(const OrtApi& api) {
  static std::mutex mutex;
  static std::list<Domain>& domains = *new std::list<Domain>;  // outlives every session
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Domain& domain : domains) {
    if (&domain.api == &api) return domain.handle;
  }
  return domains.emplace_back(api).handle;
}

}  // namespace
}  // namespace splitq::ops

extern "C" SPLITQ_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                   const OrtApiBase* base) {
  using namespace splitq::ops;
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    const std::string message = std::string("ai.splitq: expected onnxruntime ") + kNeededRuntime +
                                " or newer, got " + base->GetVersionString() +
                                "; upgrade onnxruntime";
    const OrtApi* oldest = base->GetApi(1);
    return oldest != nullptr ? oldest->CreateStatus(ORT_FAIL, message.c_str()) : nullptr;
  }
  return Guarded(*api, [&] { Check(*api, api->AddCustomOpDomain(options, DomainOf(*api))); });
}
