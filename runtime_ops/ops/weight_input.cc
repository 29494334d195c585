#include "ops/weight_input.h"

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cpu/features.h"
#include "gemm/table.h"
#include "pack/header.h"
#include "pack/layout.h"
#include "pack/pack.h"

namespace splitq::ops {
namespace {

constexpr char kExportAgain[] = "export the model again";
constexpr char kMatchVersions[] = "install the splitq-edge that exported the model";

struct HeaderField {
  const char* name;
  uint64_t expected;
  uint64_t got;
  const char* todo;
};

void CheckFields(const Node& node, const std::string& name, const PackedHeader& header,
                 const WeightSpec& spec, uint64_t payload) {
  const HeaderField fields[] = {
      {"schema", kSchema, header.schema, kMatchVersions},
      {"layout", kLayout, header.layout, kMatchVersions},
      {"nr", static_cast<uint64_t>(kPanel), header.nr, kMatchVersions},
      {"reserved", 0, header.reserved, kMatchVersions},
      {"bits", static_cast<uint64_t>(spec.bits), header.bits, kExportAgain},
      {"K", static_cast<uint64_t>(spec.channels_in), header.channels_in, kExportAgain},
      {"N", static_cast<uint64_t>(spec.channels_out), header.channels_out, kExportAgain},
      {"block_size", static_cast<uint64_t>(spec.block_size), header.block_size, kExportAgain},
      {"payload_bytes", payload, header.payload_bytes, kExportAgain},
  };
  for (const HeaderField& field : fields) {
    if (field.got == field.expected) continue;
    node.Fail("packed " + name + " with " + field.name + " " + std::to_string(field.expected),
              std::to_string(field.got), field.todo);
  }
}

ONNXTensorElementDataType PortableType(int bits) {
  return bits > 4 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4;
}

void SettleForm(const Node& node, const std::string& name, bool packed, WeightForm* form) {
  const WeightForm mine = packed ? WeightForm::kPacked : WeightForm::kPortable;
  if (*form != WeightForm::kUnknown && *form != mine) {
    node.Fail("all weights of one form",
              name + (packed ? " packed" : " portable") + " after others", kExportAgain);
  }
  *form = mine;
}

}  // namespace

void WeightInput::Read(const Node& node, size_t input, const WeightSpec& spec, WeightForm* form) {
  const std::string name = std::string("'") + node.InputName(input) + "'";
  const Tensor codes = node.AnyConstant(input);
  const bool packed = codes.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  SettleForm(node, name, packed, form);
  weight_.kernel = &FindKernel(spec.bits, ChooseIsa().isa);
  weight_.terms = &FindTermKernels(ChooseIsa().isa);
  weight_.channels_in = spec.channels_in;
  weight_.channels_out = spec.channels_out;
  weight_.block_size = spec.block_size;
  if (packed) {
    ReadPacked(node, name, codes, spec);
  } else {
    ReadPortable(node, name, codes, spec);
  }
  ReadScale(node, input + 1, spec);
}

void WeightInput::ReadPacked(const Node& node, const std::string& name, const Tensor& codes,
                             const WeightSpec& spec) {
  const int64_t header_bytes = sizeof(PackedHeader);
  const int64_t payload = PayloadBytes(spec.channels_in, spec.channels_out, spec.bits);
  const auto* bytes = codes.as<uint8_t>();
  const int64_t size = codes.shape.size() == 1 ? codes.shape[0] : 0;
  if (size < header_bytes || !HasMagic(ReadHeader(bytes))) {
    node.Fail("packed " + name + ", 1-D, that starts with the header 'SPLITQW'",
              "shape " + ToString(codes.shape) + " without it", kExportAgain);
  }
  const PackedHeader header = ReadHeader(bytes);
  CheckFields(node, name, header, spec, static_cast<uint64_t>(payload));
  if (size != header_bytes + payload) {
    node.Fail("packed " + name + " of " + std::to_string(header_bytes + payload) + " bytes",
              std::to_string(size), "copy the model again, it was cut or extended");
  }
  // Every byte is some code, so a damaged payload gives wrong numbers and nothing worse. The
  // checksum would read the whole file; `splitq-edge verify` does that.
  weight_.payload = bytes + header_bytes;
}

void WeightInput::ReadPortable(const Node& node, const std::string& name, const Tensor& codes,
                               const WeightSpec& spec) {
  const ONNXTensorElementDataType type = PortableType(spec.bits);
  const Shape shape = {spec.channels_in, spec.channels_out};
  if (codes.type != type || codes.shape != shape) {
    node.Fail(name + " of type " + ToString(type) + " and shape " + ToString(shape) +
                  ", or packed in UINT8",
              ToString(codes.type) + " " + ToString(codes.shape), kExportAgain);
  }
  std::vector<uint8_t> packed(
      static_cast<size_t>(PayloadBytes(spec.channels_in, spec.channels_out, spec.bits)));
  const PortableCodes portable{codes.as<uint8_t>(), spec.bits <= 4};
  const int64_t bad = Pack(portable, spec.channels_in, spec.channels_out, spec.bits, packed.data());
  if (bad >= 0) {
    node.Fail(name + " with codes of " + std::to_string(spec.bits) + " bits",
              std::to_string(portable.At(bad)) + " at " +
                  ToString({bad / spec.channels_out, bad % spec.channels_out}),
              kExportAgain);
  }
  packed_ = Share(std::move(packed));
  weight_.payload = packed_->data();
}

// Used where they lie if they are aligned, as exporters do; a mapped file need not do so.
void WeightInput::ReadScale(const Node& node, size_t input, const WeightSpec& spec) {
  const Shape shape = spec.block_size == 0
                          ? Shape{spec.channels_out}
                          : Shape{CeilDiv(spec.channels_in, spec.block_size), spec.channels_out};
  const Tensor scale = node.Constant(input, shape);
  weight_.scale = scale.as<float>();
  if (reinterpret_cast<uintptr_t>(scale.data) % alignof(float) == 0) return;
  scale_.resize(static_cast<size_t>(shape.front() * (shape.size() == 2 ? shape.back() : 1)));
  std::memcpy(scale_.data(), scale.data, scale_.size() * sizeof(float));
  weight_.scale = scale_.data();
}

}  // namespace splitq::ops
