#include "ops/call.h"

#include <algorithm>
#include <new>
#include <thread>

#include "ops/thread_sanitizer.h"

namespace splitq::ops {
namespace {

constexpr char kFeedAgain[] = "correct the tensor that feeds it";

struct Loop {
  ParallelFor::Task task;
  void* body;
};

}  // namespace

Call::~Call() {
  if (parallel_status_ != nullptr) api_.ReleaseStatus(parallel_status_);
}

Tensor Call::Input(size_t index) const {
  const OrtValue* value = nullptr;
  Check(api_, api_.KernelContext_GetInput(context_, index, &value));
  if (value == nullptr) {
    name_.Fail("input '" + std::string(inputs_[index].name) + "'", "none", "feed it");
  }
  return ReadTensor(api_, value);
}

Tensor Call::Input(size_t index, const Shape& shape) const {
  Tensor tensor = Input(index);
  if (tensor.shape != shape) {
    name_.Fail("input '" + std::string(inputs_[index].name) + "' of shape " + ToString(shape),
               ToString(tensor.shape), kFeedAgain);
  }
  return tensor;
}

Tensor Call::Rows(size_t index, int64_t channels) const {
  Tensor tensor = Input(index);
  if (tensor.shape.size() < 2 || tensor.shape.back() != channels) {
    name_.Fail("input '" + std::string(inputs_[index].name) + "' of shape [..., " +
                   std::to_string(channels) + "] with a leading axis",
               ToString(tensor.shape), kFeedAgain);
  }
  return tensor;
}

void* Call::RawOutput(size_t index, const Shape& shape) const {
  OrtValue* value = nullptr;
  Check(api_, api_.KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
  if (value == nullptr) {
    name_.Fail("output " + std::to_string(index), "none", "export the model again");
  }
  void* data = nullptr;
  Check(api_, api_.GetTensorMutableData(value, &data));
  return data;
}

ParallelFor Call::Parallel() {
  const ParallelFor::Runner runner = [](void* pool, int64_t count, ParallelFor::Task task,
                                        void* body) {
    Call& call = *static_cast<Call*>(pool);
    if (call.parallel_status_ != nullptr) return;
    Loop loop{task, body};
    const auto step = [](void* opaque, size_t index) {
      const Loop& loop = *static_cast<const Loop*>(opaque);
      TakeOver(&loop);
      loop.task(loop.body, static_cast<int64_t>(index));
      HandOver(&loop);
    };
    // As many batches as steps: with the default, one a thread, the first to be done would wait.
    const auto steps = static_cast<size_t>(count);
    HandOver(&loop);
    call.parallel_status_ =
        call.api_.KernelContext_ParallelFor(call.context_, step, steps, steps, &loop);
    TakeOver(&loop);
  };
  // The API does not tell how many threads the session has; it is seldom more than this.
  static const int64_t threads = std::max(1u, std::thread::hardware_concurrency());
  return ParallelFor(runner, this, threads);
}

void Call::Finish() {
  OrtStatus* status = parallel_status_;
  parallel_status_ = nullptr;
  Check(api_, status);
}

Arena::Arena(const OrtApi& api, const OrtKernelInfo* info) : api_(api) {
  Check(api, api.KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator_));
}

Arena::Block::Block(OrtAllocator* allocator, int64_t bytes)
    : allocator_(allocator), data_(allocator->Alloc(allocator, static_cast<size_t>(bytes))) {
  if (data_ == nullptr) throw std::bad_alloc();
}

}  // namespace splitq::ops
