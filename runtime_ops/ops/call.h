// What a kernel may ask and do during one run of its node.
#pragma once

#include <algorithm>

#include "include/parallel_for.h"
#include "include/sizes.h"
#include "ops/port.h"
#include "ops/tensor.h"

namespace splitq::ops {

class Call {
 public:
  Call(const OrtApi& api, OrtKernelContext* context, const NodeName& name, const Port* inputs)
      : api_(api), context_(context), name_(name), inputs_(inputs) {}
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // An input that the node has. Its type was checked by ONNX Runtime against the port.
  Tensor Input(size_t index) const;
  // Likewise, of this shape.
  Tensor Input(size_t index, const Shape& shape) const;
  // Likewise, [..., channels] with at least one leading axis.
  Tensor Rows(size_t index, int64_t channels) const;

  template <typename T>
  T* Output(size_t index, const Shape& shape) const {
    return static_cast<T*>(RawOutput(index, shape));
  }

  // ONNX Runtime's own threads.
  ParallelFor Parallel();
  // Throws if a parallel loop was not run.
  void Finish();

 private:
  void* RawOutput(size_t index, const Shape& shape) const;

  const OrtApi& api_;
  OrtKernelContext* context_;
  const NodeName& name_;
  const Port* inputs_;
  OrtStatus* parallel_status_ = nullptr;
};

// body(row) for each row; several threads where there is enough to do. width: numbers of a row.
template <typename Body>
void ForRows(Call& call, int64_t rows, int64_t width, const Body& body) {
  constexpr int64_t kTaskNumbers = int64_t{1} << 14;  // below that waking a thread costs more
  const int64_t task_rows = std::max<int64_t>(1, kTaskNumbers / width);
  call.Parallel()(CeilDiv(rows, task_rows), rows <= task_rows, [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * task_rows);
    for (int64_t row = task * task_rows; row < end; ++row) body(row);
  });
}

// Memory from ONNX Runtime's arena. The handle lives as long as a kernel, a block as long as a run.
class Arena {
 public:
  Arena(const OrtApi& api, const OrtKernelInfo* info);
  ~Arena() { api_.ReleaseAllocator(allocator_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  class Block {
   public:
    Block(OrtAllocator* allocator, int64_t bytes);
    ~Block() { allocator_->Free(allocator_, data_); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    void* data() const { return data_; }

   private:
    OrtAllocator* allocator_;
    void* data_;
  };

  Block Allocate(int64_t bytes) const { return Block(allocator_, bytes); }

 private:
  const OrtApi& api_;
  OrtAllocator* allocator_ = nullptr;
};

}  // namespace splitq::ops
