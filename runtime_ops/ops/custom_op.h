// Binds a kernel class to ONNX Runtime's OrtCustomOp, a struct of function pointers.
//
// A kernel class has
//   static constexpr char kOp[];              the op's name
//   static constexpr Port kInputs[], kOutputs[];
//   explicit Kernel(const Node& node);        checks and reads all constants
//   void Compute(Call& call) const;           one run; several may run at once
//   const NodeName& name() const;
//   static void InferShapes(const ShapeInference& shapes);
#pragma once

#include <iterator>

#include "ops/call.h"
#include "ops/node.h"
#include "ops/shape_inference.h"

namespace splitq::ops {

template <typename Kernel>
class CustomOp : public OrtCustomOp {
 public:
  // api: of the runtime that this op is registered with.
  CustomOp(const OrtApi& api, bool infer_shapes) : OrtCustomOp{}, api_(api) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp*) { return Kernel::kOp; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    DescribePorts();
    CreateKernelV2 = &Create;
    KernelComputeV2 = &Compute;
    KernelDestroy = [](void* kernel) { delete static_cast<Instance*>(kernel); };
    if (infer_shapes) InferOutputShapeFn = &InferShapes;
  }

 private:
  struct Instance {
    Instance(const OrtApi& runtime, const OrtKernelInfo* info)
        : api(runtime),
          kernel(Node(runtime, info, Kernel::kOp, Kernel::kInputs, std::size(Kernel::kInputs))) {}
    const OrtApi& api;
    Kernel kernel;
  };

  static OrtCustomOpInputOutputCharacteristic Characteristic(const Port& port) {
    return port.required ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }

  void DescribePorts() {
    GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::kInputs); };
    GetInputType = [](const OrtCustomOp*, size_t i) { return Kernel::kInputs[i].type; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
      return Characteristic(Kernel::kInputs[i]);
    };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return std::size(Kernel::kOutputs); };
    GetOutputType = [](const OrtCustomOp*, size_t i) { return Kernel::kOutputs[i].type; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) {
      return Characteristic(Kernel::kOutputs[i]);
    };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  }

  static OrtStatusPtr ORT_API_CALL Create(const OrtCustomOp*, const OrtApi* api,
                                          const OrtKernelInfo* info, void** kernel) {
    return Guarded(*api, [&] { *kernel = new Instance(*api, info); });
  }

  static OrtStatusPtr ORT_API_CALL Compute(void* opaque, OrtKernelContext* context) {
    const Instance& instance = *static_cast<const Instance*>(opaque);
    return Guarded(instance.api, [&] {
      Call call(instance.api, context, instance.kernel.name(), Kernel::kInputs);
      instance.kernel.Compute(call);
      call.Finish();
    });
  }

  // A shape that cannot be told before the run is no error: creating or running the kernel reports
  // what is wrong with the node.
  static OrtStatusPtr ORT_API_CALL InferShapes(const OrtCustomOp* op,
                                               OrtShapeInferContext* context) {
    const OrtApi& api = static_cast<const CustomOp*>(op)->api_;
    OrtStatus* status = Guarded(api, [&] { Kernel::InferShapes(ShapeInference(api, context)); });
    if (status != nullptr) api.ReleaseStatus(status);
    return nullptr;
  }

  const OrtApi& api_;
};

}  // namespace splitq::ops
