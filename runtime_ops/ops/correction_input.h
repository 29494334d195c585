// The low-rank factors and gates that SplitQLinear and CrossModalCorrection share.
#pragma once

#include <vector>

#include "linear/correction.h"
#include "ops/weight_input.h"

namespace splitq::ops {

class CorrectionInput {
 public:
  // Attributes cws_rank, mac_rank and mac_rows; without a rank there is no correction.
  explicit CorrectionInput(const Node& node);
  CorrectionInput(const CorrectionInput&) = delete;
  CorrectionInput& operator=(const CorrectionInput&) = delete;

  // first_input: index of u; u_scale, v, v_scale, gate_cws and gate_mac follow.
  // main: K_m; outputs: N; bits: of u and v.
  void Read(const Node& node, size_t first_input, int64_t main, int64_t outputs, int bits,
            WeightForm* form);

  bool present() const { return rank_ > 0; }
  int64_t rank() const { return rank_; }
  bool needs_modality() const { return correction_.mac_rank > 0 && correction_.mac_on_text_only; }
  const Correction& correction() const { return correction_; }

 private:
  const float* ReadGate(const Node& node, size_t input, int64_t rank, std::vector<float>* gate);

  int64_t rank_ = 0;
  Correction correction_;
  WeightInput u_, v_;
  std::vector<float> gate_cws_, gate_mac_;
};

}  // namespace splitq::ops
