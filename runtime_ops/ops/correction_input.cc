#include "ops/correction_input.h"

#include <algorithm>
#include <cstring>

#include "pack/layout.h"
#include "quantize/table.h"

namespace splitq::ops {

CorrectionInput::CorrectionInput(const Node& node) {
  correction_.kernels = &FindRowKernels(ChooseIsa().isa);
  correction_.cws_rank = node.Int("cws_rank", 0, kMaxChannelsIn, 0);
  correction_.mac_rank = node.Int("mac_rank", 0, kMaxChannelsIn, 0);
  const std::string rows = node.String("mac_rows", "text");
  if (rows != "text" && rows != "all") {
    node.Fail("attribute 'mac_rows' \"text\" or \"all\"", "\"" + rows + "\"",
              "export the model again");
  }
  correction_.mac_on_text_only = rows == "text";
  rank_ = std::max(correction_.cws_rank, correction_.mac_rank);
}

void CorrectionInput::Read(const Node& node, size_t first_input, int64_t main, int64_t outputs,
                           int bits, WeightForm* form) {
  const std::string ranks = "cws_rank is " + std::to_string(correction_.cws_rank) +
                            " and mac_rank is " + std::to_string(correction_.mac_rank);
  for (size_t i = 0; i < 4; ++i) node.CheckPresence(first_input + i, present(), ranks);
  node.CheckPresence(first_input + 4, correction_.cws_rank > 0, ranks);
  node.CheckPresence(first_input + 5, correction_.mac_rank > 0, ranks);
  if (!present()) return;
  u_.Read(node, first_input, {main, rank_, bits, 0}, form);
  v_.Read(node, first_input + 2, {rank_, outputs, bits, 0}, form);
  correction_.u = u_.weight();
  correction_.v = v_.weight();
  correction_.gate_cws = ReadGate(node, first_input + 4, correction_.cws_rank, &gate_cws_);
  correction_.gate_mac = ReadGate(node, first_input + 5, correction_.mac_rank, &gate_mac_);
}

const float* CorrectionInput::ReadGate(const Node& node, size_t input, int64_t rank,
                                       std::vector<float>* gate) {
  if (rank == 0) return nullptr;
  const Tensor tensor = node.Constant(input, {rank});
  gate->resize(static_cast<size_t>(rank));
  std::memcpy(gate->data(), tensor.data, gate->size() * sizeof(float));
  return gate->data();
}

}  // namespace splitq::ops
