// The functions that the library exports: RegisterCustomOps for ONNX Runtime, SplitQIsa for people.
#include <cstdio>
#include <list>
#include <mutex>
#include <string>

#include "cpu/features.h"
#include "ops/attention_op.h"
#include "ops/channel_split_op.h"
#include "ops/correction_op.h"
#include "ops/skip_norm_op.h"
#include "ops/split_linear_op.h"
#include "ops/swiglu_op.h"

#if defined(_WIN32)
#define SPLITQ_EXPORT __declspec(dllexport)
#else
#define SPLITQ_EXPORT __attribute__((visibility("default")))
#endif

namespace splitq::ops {
namespace {

// Runtimes before 1.24 follow a null pointer when they prepare shape inference for a node that
// omits an input in the middle of the list; without the callback they prepare nothing.
bool CanInferShapes(const std::string& version) {
  int major = 0, minor = 0;
  if (std::sscanf(version.c_str(), "%d.%d", &major, &minor) != 2) return false;
  return major > 1 || (major == 1 && minor >= 24);
}

// The ops as one runtime sees them. Sessions keep pointers, so this lives as long as the process.
struct Domain {
  Domain(const OrtApi& runtime, bool infer_shapes)
      : api(runtime),
        linear(runtime, infer_shapes),
        channel_split(runtime, infer_shapes),
        correction(runtime, infer_shapes),
        swiglu(runtime, infer_shapes),
        skip_norm(runtime, infer_shapes),
        attention(runtime, infer_shapes),
        half_attention(runtime, infer_shapes) {
    Check(api, api.CreateCustomOpDomain("ai.splitq", &handle));
    Check(api, api.CustomOpDomain_Add(handle, &linear));
    Check(api, api.CustomOpDomain_Add(handle, &channel_split));
    Check(api, api.CustomOpDomain_Add(handle, &correction));
    Check(api, api.CustomOpDomain_Add(handle, &swiglu));
    Check(api, api.CustomOpDomain_Add(handle, &skip_norm));
    Check(api, api.CustomOpDomain_Add(handle, &attention));
    Check(api, api.CustomOpDomain_Add(handle, &half_attention));
  }

  const OrtApi& api;
  CustomOp<SplitLinearKernel> linear;
  CustomOp<ChannelSplitKernel> channel_split;
  CustomOp<CorrectionKernel> correction;
  CustomOp<SwiGluOp> swiglu;
  CustomOp<SkipNormOp> skip_norm;
  CustomOp<CachedAttentionOp<kFloat>> attention;
  CustomOp<CachedAttentionOp<kFloat16>> half_attention;
  OrtCustomOpDomain* handle = nullptr;
};

// One domain a runtime: a process may have loaded two of different versions.
OrtCustomOpDomain* DomainOf(const OrtApi& api, const std::string& version) {
  static std::mutex mutex;
  static std::list<Domain>& domains = *new std::list<Domain>;  // outlives every session
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Domain& domain : domains) {
    if (&domain.api == &api) return domain.handle;
  }
  return domains.emplace_back(api, CanInferShapes(version)).handle;
}

// A misspelt wish must not turn into the default unnoticed.
void CheckIsa(const IsaChoice& choice) {
  if (choice.unknown == nullptr) return;
  throw OpError(std::string("SPLITQ_ISA: expected ") + kIsaNames + ", got '" + choice.unknown +
                "'; correct the variable or unset it");
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
  return Guarded(*api, [&] {
    CheckIsa(splitq::ChooseIsa());
    Check(*api, api->AddCustomOpDomain(options, DomainOf(*api, base->GetVersionString())));
  });
}

// The instruction set of the kernels in use, a name of cpu/features.h. The string is static.
extern "C" SPLITQ_EXPORT const char* SplitQIsa() {
  return splitq::IsaName(splitq::ChooseIsa().isa);
}
