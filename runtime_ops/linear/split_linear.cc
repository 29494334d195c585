// Two passes: tasks of a few rows to codes (and latent codes of the correction), then tiles of rows
// x a few panels of output channels to y. The second starts when all codes exist, because every
// output channel needs every input channel. Several threads run both in one loop: those that find
// no codes left to make read weights meanwhile.
#include "linear/split_linear.h"

#include <algorithm>
#include <atomic>
#include <thread>

#include "include/pause.h"
#include "include/prefetch.h"
#include "include/scratch.h"
#include "linear/panel_queue.h"
#include "linear/panel_terms.h"

namespace splitq {
namespace {

// Rows of a task of the first pass: few, to give every thread some of a short prompt; more where
// every thread has a task all the same, because each task reads U once.
constexpr int64_t LeastTaskRows(int64_t rows) { return rows <= 32 ? 8 : 16; }
constexpr int64_t TaskRows(int64_t rows, int64_t threads) {
  return rows >= 64 * threads ? 32 : LeastTaskRows(rows);
}

// Below this many units (a multiplication of a code, unpacking it counted as eight) one thread is
// done before another has woken up.
constexpr int64_t kSerialWork = int64_t{1} << 20;
constexpr int64_t kUnpackWork = 8;

// So many rows wait for memory more than they compute.
constexpr int64_t kFewRows = 4;

struct Buffers {
  std::array<CodeRows, kGroups> codes;
  CodeRows latent;
  int64_t task_floats = 0;
  float* floats = nullptr;       // [tasks, task_floats]
  CodeRows residual;             // [rows]
  int64_t* mac_index = nullptr;  // [rows]
};

Buffers TakeBuffers(const SplitLinear& layer, int64_t rows, Scratch& scratch) {
  Buffers buffers;
  for (int g = 0; g < kGroups; ++g) {
    const int64_t width = layer.activation.groups[g].width;
    if (width == 0) continue;
    buffers.codes[g] = TakeCodeRows(scratch, rows, width, layer.weights[g].block_size);
  }
  buffers.task_floats = RowWorkspace(layer.activation);
  if (layer.corrected) {
    buffers.latent = TakeCodeRows(scratch, rows, layer.correction.rank());
    buffers.task_floats = std::max(buffers.task_floats, LatentWorkspace(layer.correction));
    if (layer.correction.mac_rank > 0) {
      buffers.residual = TakeCodeRows(scratch, rows, layer.activation.groups[kMain].width);
      buffers.mac_index = scratch.Take<int64_t>(rows);
    }
  }
  buffers.floats = scratch.Take<float>(CeilDiv(rows, LeastTaskRows(rows)) * buffers.task_floats);
  return buffers;
}

MemoryRange RangeOf(const PackedWeight& weight, PanelRange panels) {
  return {weight.panel(panels.first), panels.count * weight.panel_bytes()};
}

MemoryRange RangeOf(const PackedWeight& weight) { return RangeOf(weight, {0, weight.panels()}); }

// What is read next after row m: the row behind it, or else the weights that come first, `main` of
// the main group's.
ReadAhead ReadAheadOf(const SplitLinear& layer, const SplitLinearRows& data, int64_t m,
                      MemoryRange main) {
  constexpr int64_t kMost = int64_t{256} << 10;  // bytes: less than the L2 cache holds
  if (m + 1 < data.rows) {
    const int64_t channels = layer.activation.gather.channels;
    const auto row_bytes = channels * static_cast<int64_t>(sizeof(float));
    return {{data.x + (m + 1) * channels, row_bytes}, {}};
  }
  main.bytes = std::min(main.bytes, kMost);
  return layer.corrected ? ReadAhead{RangeOf(layer.correction.u), main} : ReadAhead{main, {}};
}

// The first bytes of an array, if there is one: all of it, but for the widest layers.
SPLITQ_PREFETCH void PrefetchFirst(const void* data, int64_t bytes) {
  constexpr int64_t kMost = int64_t{32} << 10;
  if (data != nullptr) Prefetch(data, bytes < kMost ? bytes : kMost);
}

// Begins to load what a few rows need beside the long streams of weights: a dozen short arrays,
// each on a page of its own. Asked for one after the other, when it is needed, each would take as
// long as memory and the page table take to answer.
SPLITQ_PREFETCH void PrefetchShort(const SplitLinear& layer) {
  constexpr auto kFloat = static_cast<int64_t>(sizeof(float));
  const ActivationPlan& plan = layer.activation;
  const int64_t channels = plan.gather.channels;
  const int32_t* order = plan.gather.order;
  if (order != nullptr && plan.kernels->windows) {  // the outliers' channels seldom have one
    constexpr auto kWindow = static_cast<int64_t>(sizeof(GatherWindow));
    const int64_t main = plan.groups[kMain].width;
    PrefetchFirst(plan.gather.windows, channels / kGatherBlock * kWindow);
    PrefetchFirst(order + main, (channels - main) * kFloat);
  } else {
    PrefetchFirst(order, channels * kFloat);
  }
  PrefetchFirst(plan.gather.scale, channels * kFloat);
  for (const ChannelGroup& group : plan.groups) {
    if (group.width == 0) continue;
    const KroneckerFactors& factors = group.factors;
    PrefetchFirst(factors.p2, factors.b * factors.b * kFloat);
    PrefetchFirst(factors.p1, factors.blocks * factors.a * factors.a * kFloat);
  }
  if (!layer.corrected) return;
  const Correction& correction = layer.correction;
  PrefetchFirst(correction.u.payload, correction.u.panels() * correction.u.panel_bytes());
  PrefetchFirst(correction.u.scale, correction.rank() * kFloat);
  PrefetchFirst(correction.gate_cws, correction.cws_rank * kFloat);
  PrefetchFirst(correction.gate_mac, correction.mac_rank * kFloat);
}

// Codes of rows [first, first + count); residual codes only of the rows that take MAC, gathered at
// the front of the task's part of `residual`.
MacRows PrepareCodes(const SplitLinear& layer, const SplitLinearRows& data, const Buffers& buffers,
                     int64_t first, int64_t count, MemoryRange next, float* floats) {
  const ActivationPlan& plan = layer.activation;
  const bool has_mac = buffers.mac_index != nullptr;
  int64_t* index = has_mac ? buffers.mac_index + first : nullptr;
  MacRows mac{has_mac ? buffers.residual.from(first) : CodeRows{}, index, 0};
  for (int64_t m = first; m < first + count; ++m) {
    RowTarget target;
    for (int g = 0; g < kGroups; ++g) {
      if (plan.groups[g].width > 0) target.groups[g] = buffers.codes[g].target(m);
    }
    if (has_mac && TakesMac(layer.correction, data.modality, m)) {
      target.residual = mac.residual.target(mac.count);
    }
    ReadAhead ahead = ReadAheadOf(layer, data, m, next);
    QuantizeRow(plan, data.x + m * plan.gather.channels, &ahead, floats, target);
    for (int g = 0; g < kGroups; ++g) {
      if (plan.groups[g].width > 0) FinishRow(*plan.kernels, buffers.codes[g], m);
    }
    if (target.residual.codes != nullptr) {
      FinishRow(*plan.kernels, mac.residual, mac.count);
      index[mac.count++] = m - first;
    }
  }
  return mac;
}

// The codes of a task of the first pass, then, if the layer is corrected, the latent codes.
// next: main weights that are read after them. coded(): called in between.
template <typename Coded>
void PrepareTask(const SplitLinear& layer, const SplitLinearRows& data, const Buffers& buffers,
                 int64_t task, int64_t task_rows, MemoryRange next, const Coded& coded) {
  const int64_t first = task * task_rows;
  const int64_t count = std::min(data.rows - first, task_rows);
  float* floats = buffers.floats + task * buffers.task_floats;
  const MacRows mac = PrepareCodes(layer, data, buffers, first, count, next, floats);
  coded();
  if (!layer.corrected) return;
  const CodeRows latent = buffers.latent.from(first);
  QuantizeLatent(layer.correction, buffers.codes[kMain].from(first), mac, count, floats, latent);
}

// The last panel when it has less than 16 channels.
void StoreNarrow(const float* terms, int64_t rows, int64_t width, const float* bias, float* y,
                 int64_t y_stride) {
  for (int64_t m = 0; m < rows; ++m, terms += kPanel, y += y_stride) {
    for (int64_t n = 0; n < width; ++n) y[n] = bias != nullptr ? terms[n] + bias[n] : terms[n];
  }
}

// Terms [panels, rows, 16] to y of `count` rows: a few rows at a time, whose lines of y lie side by
// side, while rows lie a page or more apart.
void StoreTile(const SplitLinear& layer, const float* terms, int64_t count, PanelRange panels,
               float* y) {
  constexpr int64_t kRows = 8;
  const int64_t outputs = layer.channels_out();
  for (int64_t m = 0; m < count; m += kRows) {
    const int64_t rows = std::min(count - m, kRows);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t panel = panels.first + p;
      const float* bias = layer.bias != nullptr ? layer.bias + panel * kPanel : nullptr;
      const float* from = terms + (p * count + m) * kPanel;
      float* to = y + m * outputs + panel * kPanel;
      const int64_t width = PanelWidth(layer.weights[kMain], panel);
      if (width == kPanel) {
        layer.weights[kMain].terms->store(from, rows, bias, to, outputs);
      } else {
        StoreNarrow(from, rows, width, bias, to, outputs);
      }
    }
  }
}

// A few panels of a weight with their scales.
SPLITQ_PREFETCH void PrefetchPanels(const PackedWeight& weight, PanelRange panels) {
  constexpr int64_t kScaleBytes = kPanel * static_cast<int64_t>(sizeof(float));
  Prefetch(weight.panel(panels.first), panels.count * weight.panel_bytes());
  Prefetch(weight.scale + panels.first * kPanel, panels.count * kScaleBytes);
}

// What a tile reads beside the main weight: short pieces, for each of which it would wait as long
// as memory takes to answer. Not for few rows, whose tiles read long ones.
SPLITQ_PREFETCH void PrefetchExtras(const SplitLinear& layer, PanelRange panels) {
  for (int g = kMain + 1; g < kGroups; ++g) {
    if (layer.activation.groups[g].width > 0) PrefetchPanels(layer.weights[g], panels);
  }
  if (layer.corrected) PrefetchPanels(layer.correction.v, panels);
}

// y of rows [first, first + count) and the channels of a few panels, summed in the order main,
// text, vision, correction, bias. wait_latent(): returns when there are latent codes.
template <typename WaitLatent>
void OutputTile(const SplitLinear& layer, const SplitLinearRows& data, const Buffers& buffers,
                const OutputRange& range, const WaitLatent& wait_latent) {
  const auto [first, count, panels] = range;
  if (count > kFewRows) PrefetchExtras(layer, panels);
  FloatTile total;
  PanelTerms(layer.weights[kMain], panels, buffers.codes[kMain].from(first), count, total);
  Factors factors[kMostFactors];
  int64_t added = 0;
  for (int g = kMain + 1; g < kGroups; ++g) {
    if (layer.activation.groups[g].width == 0) continue;
    factors[added++] = {&layer.weights[g], buffers.codes[g].from(first)};
  }
  if (layer.corrected) factors[added++] = {&layer.correction.v, buffers.latent.from(first)};
  float* y = data.y + first * layer.channels_out();
  if (HaveOutput(factors, added)) {
    if (layer.corrected) wait_latent();
    return OutputTerms(factors, added, panels, count, total, {layer.bias, y});
  }
  for (int64_t i = 0; i < added; ++i) {
    if (layer.corrected && i == added - 1) wait_latent();  // the latent codes come last
    AddPanelTerms(*factors[i].weight, panels, factors[i].rows, count, total);
  }
  StoreTile(layer, total, count, panels, y);
}

// Something that a few tasks make and every thread waits for.
class Ready {
 public:
  explicit Ready(int64_t tasks) : left_(tasks) {}

  // Called by each task.
  void Set() { left_.fetch_sub(1, std::memory_order_release); }

  // Meanwhile reads memory that will be needed.
  void Wait(MemoryRange range) const {
    constexpr int64_t kPiece = 1024;               // bytes between two looks
    constexpr int64_t kMost = int64_t{768} << 10;  // bytes, for an L2 cache of 1 MiB
    constexpr int kLooks = 10000;                  // before the processor is left to others
    const char* next = static_cast<const char*>(range.data);
    const char* end = next + std::min(range.bytes, kMost);
    for (int looks = 0; left_.load(std::memory_order_acquire) > 0; ++looks) {
      const int64_t piece = std::min<int64_t>(end - next, kPiece);
      Prefetch(next, piece);
      next += piece;
      if (piece == 0) Pause();
      if (looks >= kLooks) std::this_thread::yield();  // the other may have no processor
    }
  }

 private:
  std::atomic<int64_t> left_;
};

// Both passes in one loop. Every thread first takes a tile, to know which weights it will read.
void RunBothPasses(const SplitLinear& layer, const SplitLinearRows& data, const Buffers& buffers,
                   PanelQueue& queue, const ParallelFor& parallel) {
  const int64_t task_rows = TaskRows(data.rows, parallel.threads());
  const int64_t tasks = CeilDiv(data.rows, task_rows);
  std::atomic<int64_t> next{0}, left{queue.tiles()};
  Ready codes(tasks), latent(tasks);
  parallel(std::min(parallel.threads(), std::max(tasks, queue.tiles())), false, [&](int64_t) {
    OutputRange range = {};
    MemoryRange weights = {};
    const auto take = [&] {
      if (left.fetch_sub(1, std::memory_order_relaxed) <= 0) return false;
      range = queue.Next();
      weights = RangeOf(layer.weights[kMain], range.panels);
      return true;
    };
    bool taken = take();
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      PrepareTask(layer, data, buffers, task, task_rows, weights, [&] { codes.Set(); });
      latent.Set();
    }
    for (; taken; taken = take()) {
      codes.Wait(weights);
      OutputTile(layer, data, buffers, range, [&] { latent.Wait({}); });
    }
  });
}

}  // namespace

int64_t ScratchBytes(const SplitLinear& layer, int64_t rows) {
  Scratch scratch;
  TakeBuffers(layer, rows, scratch);
  return scratch.used() + Scratch::kAlign;
}

void RunSplitLinear(const SplitLinear& layer, const SplitLinearRows& data, void* memory,
                    const ParallelFor& parallel) {
  Scratch scratch(memory);
  const Buffers buffers = TakeBuffers(layer, data.rows, scratch);
  const int64_t weight_codes = layer.activation.gather.channels * layer.channels_out();
  const bool serial = weight_codes < kSerialWork / (data.rows + kUnpackWork);
  if (data.rows <= kFewRows) PrefetchShort(layer);
  const int64_t threads = serial ? 1 : parallel.threads();
  PanelQueue queue(data.rows, layer.weights[kMain].panels(), threads);
  if (threads > 1) return RunBothPasses(layer, data, buffers, queue, parallel);
  const int64_t task_rows = TaskRows(data.rows, 1), tasks = CeilDiv(data.rows, task_rows);
  const MemoryRange weights = RangeOf(layer.weights[kMain]);
  for (int64_t task = 0; task < tasks; ++task) {
    PrepareTask(layer, data, buffers, task, task_rows, weights, [] {});
  }
  for (int64_t tile = 0; tile < queue.tiles(); ++tile) {
    OutputTile(layer, data, buffers, queue.Next(), [] {});
  }
}

}  // namespace splitq
