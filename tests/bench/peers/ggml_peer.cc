// llama.cpp's linear layer for the benchmark (kernels.py, through ctypes): several copies of one
// quantized weight, multiplied with the same rows in one graph.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

struct Free {
  void operator()(ggml_context* context) const { ggml_free(context); }
  void operator()(ggml_backend* backend) const { ggml_backend_free(backend); }
  void operator()(ggml_backend_buffer* buffer) const { ggml_backend_buffer_free(buffer); }
};

template <typename T>
using Owned = std::unique_ptr<T, Free>;

struct Peer {
  Owned<ggml_backend> backend;
  Owned<ggml_context> weight_context, graph_context;
  Owned<ggml_backend_buffer> weight_buffer, graph_buffer;
  ggml_tensor* x = nullptr;
  ggml_tensor* first_output = nullptr;
  ggml_cgraph* graph = nullptr;
  std::string buffer_name;
  int64_t weight_bytes = 0;
};

Owned<ggml_context> NewContext(int64_t tensors) {
  const size_t bytes =
      ggml_tensor_overhead() * static_cast<size_t>(tensors) + ggml_graph_overhead();
  return Owned<ggml_context>(ggml_init({bytes, nullptr, true}));
}

bool FindType(const char* name, ggml_type* type) {
  for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
    const char* other = ggml_type_name(static_cast<ggml_type>(i));
    if (other == nullptr || std::strcmp(other, name) != 0) continue;
    *type = static_cast<ggml_type>(i);
    return true;
  }
  return false;
}

// The first buffer type of the CPU that stores such a weight in an order of its own, or null.
ggml_backend_buffer_type_t RepackedBuffer(ggml_backend_t backend, ggml_type type, int64_t k,
                                          int64_t n) {
  ggml_backend_dev_t device = ggml_backend_get_device(backend);
  void* found = ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device),
                                                  "ggml_backend_dev_get_extra_bufts");
  const auto list = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(found);
  if (list == nullptr) return nullptr;
  for (ggml_backend_buffer_type_t* buffer = list(device); buffer != nullptr && *buffer != nullptr;
       ++buffer) {
    const Owned<ggml_context> context = NewContext(8);
    ggml_tensor* weight = ggml_new_tensor_2d(context.get(), type, k, n);
    ggml_tensor* rows = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, k, 16);
    ggml_tensor* product = ggml_mul_mat(context.get(), weight, rows);
    const Owned<ggml_backend_buffer> empty(ggml_backend_buft_alloc_buffer(*buffer, 0));
    weight->buffer = empty.get();
    if (ggml_backend_dev_supports_op(device, product)) return *buffer;
  }
  return nullptr;
}

// n rows, the `unique` quantized ones again and again.
std::vector<char> Quantize(ggml_type type, const float* weight, int64_t unique, int64_t n,
                           int64_t k) {
  const size_t row = ggml_row_size(type, k);
  const std::vector<float> importance(static_cast<size_t>(k), 1.0f);
  std::vector<char> data(row * static_cast<size_t>(n));
  ggml_quantize_chunk(type, weight, data.data(), 0, unique, k, importance.data());
  for (int64_t i = unique; i < n; i += unique) {
    const size_t count = static_cast<size_t>(std::min(unique, n - i));
    std::memcpy(data.data() + row * static_cast<size_t>(i), data.data(), row * count);
  }
  return data;
}

}  // namespace

extern "C" {

// weight: [unique, k] floats, the first of the n output channels, which repeat them. Null if there
// is no such type, k is no multiple of its block, or `repacked` and ggml has no order of its own.
void* ggml_peer_new(const char* type_name, int repacked, const float* weight, int64_t unique,
                    int64_t k, int64_t n, int64_t copies, int64_t rows, int threads) {
  ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  ggml_type type;
  if (!FindType(type_name, &type) || k % ggml_blck_size(type) != 0) return nullptr;
  auto peer = std::make_unique<Peer>();
  peer->backend.reset(ggml_backend_cpu_init());
  ggml_backend_cpu_set_n_threads(peer->backend.get(), threads);
  ggml_backend_buffer_type_t buffer =
      repacked ? RepackedBuffer(peer->backend.get(), type, k, n) : ggml_backend_cpu_buffer_type();
  if (buffer == nullptr) return nullptr;
  peer->buffer_name = ggml_backend_buft_name(buffer);

  peer->weight_context = NewContext(copies);
  std::vector<ggml_tensor*> weights;
  for (int64_t i = 0; i < copies; ++i) {
    weights.push_back(ggml_new_tensor_2d(peer->weight_context.get(), type, k, n));
  }
  peer->weight_buffer.reset(
      ggml_backend_alloc_ctx_tensors_from_buft(peer->weight_context.get(), buffer));
  if (peer->weight_buffer == nullptr) return nullptr;
  const std::vector<char> data = Quantize(type, weight, unique, n, k);
  for (ggml_tensor* tensor : weights) ggml_backend_tensor_set(tensor, data.data(), 0, data.size());
  peer->weight_bytes = static_cast<int64_t>(data.size());

  peer->graph_context = NewContext(2 * copies + 8);
  ggml_context* context = peer->graph_context.get();
  peer->x = ggml_new_tensor_2d(context, GGML_TYPE_F32, k, rows);
  peer->graph = ggml_new_graph(context);
  for (ggml_tensor* tensor : weights) {
    ggml_tensor* product = ggml_mul_mat(context, tensor, peer->x);
    if (peer->first_output == nullptr) peer->first_output = product;
    ggml_build_forward_expand(peer->graph, product);
  }
  peer->graph_buffer.reset(ggml_backend_alloc_ctx_tensors(context, peer->backend.get()));
  if (peer->graph_buffer == nullptr) return nullptr;
  return peer.release();
}

// What ggml keeps of a weight: rounded to its codes and back. weight, out: [rows, k]. Whether there
// is such a type.
int ggml_round_trip(const char* type_name, const float* weight, int64_t rows, int64_t k,
                    float* out) {
  ggml_type type;
  if (!FindType(type_name, &type) || k % ggml_blck_size(type) != 0) return 0;
  const std::vector<char> data = Quantize(type, weight, rows, rows, k);
  ggml_get_type_traits(type)->to_float(data.data(), out, rows * k);
  return 1;
}

void ggml_peer_delete(void* peer) { delete static_cast<Peer*>(peer); }

// Bytes of one copy of the weight.
int64_t ggml_peer_weight_bytes(const void* peer) {
  return static_cast<const Peer*>(peer)->weight_bytes;
}

// Name of the buffer type that holds the weights.
const char* ggml_peer_buffer(const void* peer) {
  return static_cast<const Peer*>(peer)->buffer_name.c_str();
}

// x: [rows, k].
void ggml_peer_set_x(void* opaque, const float* x) {
  Peer* peer = static_cast<Peer*>(opaque);
  ggml_backend_tensor_set(peer->x, x, 0, ggml_nbytes(peer->x));
}

// The products of all copies; whether they were computed.
int ggml_peer_run(void* opaque) {
  Peer* peer = static_cast<Peer*>(opaque);
  return ggml_backend_graph_compute(peer->backend.get(), peer->graph) == GGML_STATUS_SUCCESS;
}

// y: [rows, n] of the first copy.
void ggml_peer_get_y(const void* opaque, float* y) {
  const Peer* peer = static_cast<const Peer*>(opaque);
  ggml_backend_tensor_get(peer->first_output, y, 0, ggml_nbytes(peer->first_output));
}

}  // extern "C"
