// What the processor can do at best: the rate of its widest integer dot product, without memory,
// and of reading memory. Times are each thread's own, so that another process takes nothing away.
// And how far two processors are from each other, which tells whether they share a cache.
#include <time.h>

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define SPLITQ_REGISTER(value) "+v"(value)
#elif defined(__aarch64__)
#include <arm_neon.h>
#define SPLITQ_REGISTER(value) "+w"(value)
#endif

namespace {

// One register of the dot product: 4 int8 products to a 32-bit lane.
#if defined(__AVX512VNNI__)
using Register = __m512i;
Register Filled(int i) { return _mm512_set1_epi32(i); }
inline Register Dot(Register sum, Register a, Register b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVXVNNI__)
using Register = __m256i;
Register Filled(int i) { return _mm256_set1_epi32(i); }
inline Register Dot(Register sum, Register a, Register b) {
  return _mm256_dpbusd_avx_epi32(sum, a, b);
}
#elif defined(__AVX2__)
using Register = __m256i;
Register Filled(int i) { return _mm256_set1_epi32(i); }
inline Register Dot(Register sum, Register a, Register b) {
  const __m256i pairs = _mm256_maddubs_epi16(a, b);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#elif defined(__ARM_FEATURE_MATMUL_INT8)
using Register = int32x4_t;
Register Filled(int i) { return vdupq_n_s32(i); }
inline Register Dot(Register sum, Register a, Register b) {
  return vmmlaq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
}
#elif defined(__ARM_FEATURE_DOTPROD)
using Register = int32x4_t;
Register Filled(int i) { return vdupq_n_s32(i); }
inline Register Dot(Register sum, Register a, Register b) {
  return vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
}
#else
#define SPLITQ_NO_DOT
#endif

#if !defined(SPLITQ_NO_DOT)

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int kProducts = 32;  // of an instruction
#else
constexpr int kProducts = static_cast<int>(sizeof(Register));
#endif

constexpr int kChains = 8;  // sums: more than the latency times the instructions a cycle
constexpr int64_t kLoops = int64_t{1} << 22;

int64_t Spin(int seed) {
  // Not an array: compilers would keep it in memory.
  Register s0 = Filled(seed), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
  const Register a = Filled(0x01020304 + seed), b = Filled(0x01010101 + seed);
  for (int64_t loop = 0; loop < kLoops; ++loop) {
    // The compiler is not to see that all sums are equal.
    asm volatile(""
                 : SPLITQ_REGISTER(s0), SPLITQ_REGISTER(s1), SPLITQ_REGISTER(s2),
                   SPLITQ_REGISTER(s3));
    asm volatile(""
                 : SPLITQ_REGISTER(s4), SPLITQ_REGISTER(s5), SPLITQ_REGISTER(s6),
                   SPLITQ_REGISTER(s7));
    s0 = Dot(s0, a, b);
    s1 = Dot(s1, a, b);
    s2 = Dot(s2, a, b);
    s3 = Dot(s3, a, b);
    s4 = Dot(s4, a, b);
    s5 = Dot(s5, a, b);
    s6 = Dot(s6, a, b);
    s7 = Dot(s7, a, b);
  }
  const Register total = s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7;  // the compiler's vector type adds
  int64_t first;
  __builtin_memcpy(&first, &total, sizeof(first));
  return first;
}
#endif

double Seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// The best of five sums of the threads' rates; work(i) gives what it must keep alive.
template <typename Work>
double BestRate(int threads, double amount, const Work& work) {
  double best = 0.0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    std::atomic<int64_t> kept{0};
    std::vector<double> rates(static_cast<size_t>(threads));
    const auto run = [&](int i) {
      const double start = Seconds(CLOCK_THREAD_CPUTIME_ID);
      kept += work(i);
      rates[static_cast<size_t>(i)] = amount / (Seconds(CLOCK_THREAD_CPUTIME_ID) - start);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(run, i);
    run(0);
    for (std::thread& other : others) other.join();
    double total = 0.0;
    for (const double rate : rates) total += rate;
    if (total > best) best = total;
  }
  return best;
}

// count: a multiple of 16.
int64_t ReadAll(const int64_t* values, size_t count) {
  int64_t sums[16] = {};
  for (size_t i = 0; i < count; i += 16) {
    for (size_t lane = 0; lane < 16; ++lane) sums[lane] += values[i + lane];
  }
  int64_t total = 0;
  for (const int64_t sum : sums) total += sum;
  return total;
}

bool KeepOn(int processor) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<unsigned>(processor), &set);
  return sched_setaffinity(0, sizeof(set), &set) == 0;
#else
  static_cast<void>(processor);
  return false;
#endif
}

// Threads on processors of their own that begin at once, or not at all where one cannot have its.
class Start {
 public:
  explicit Start(int threads) : missing_(threads) {}

  bool On(int processor) {
    if (!KeepOn(processor)) failed_ = true;
    --missing_;
    while (missing_ > 0) std::this_thread::yield();
    return !failed_;
  }

  bool failed() const { return failed_; }

 private:
  std::atomic<int> missing_;
  std::atomic<bool> failed_{false};
};

}  // namespace

extern "C" {

// 10^9 additions and multiplications a second of int8 products on so many threads; 0 if this
// program knows no dot product of the processor.
double peak_gops(int threads) {
#if defined(SPLITQ_NO_DOT)
  static_cast<void>(threads);
  return 0.0;
#else
  const double operations = 2.0 * static_cast<double>(kLoops) * kChains * kProducts;
  return BestRate(threads, operations, Spin) / 1e9;
#endif
}

// 10^9 bytes a second that so many threads read from memory, 256 MB each.
double read_gbps(int threads) {
  const std::vector<std::vector<int64_t>> parts(static_cast<size_t>(threads),
                                                std::vector<int64_t>(size_t{1} << 25, 1));
  const double bytes = static_cast<double>(parts[0].size() * sizeof(int64_t));
  const auto read = [&](int i) {
    const std::vector<int64_t>& part = parts[static_cast<size_t>(i)];
    return ReadAll(part.data(), part.size());
  };
  return BestRate(threads, bytes, read) / 1e9;
}

// 10^9 bytes a second at which values are read `passes` times, in equal parts by a thread on each
// of the processors; 0 if threads cannot be kept on them here. count: a multiple of 16 times
// threads.
double read_on_gbps(const int64_t* values, int64_t count, int passes, const int* processors,
                    int threads) {
  struct Time {
    double from, to;
  };
  std::vector<Time> times(static_cast<size_t>(threads));
  std::atomic<int64_t> kept{0};
  Start start(threads);
  const int64_t part = count / threads;
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) {
    all.emplace_back([&, i] {
      if (!start.On(processors[i])) return;
      Time& time = times[static_cast<size_t>(i)];
      time.from = Seconds(CLOCK_MONOTONIC);
      for (int pass = 0; pass < passes; ++pass) {
        kept += ReadAll(values + i * part, static_cast<size_t>(part));
      }
      time.to = Seconds(CLOCK_MONOTONIC);
    });
  }
  for (std::thread& each : all) each.join();
  if (start.failed()) return 0.0;
  Time whole = times[0];
  for (const Time& time : times) {
    whole.from = std::min(whole.from, time.from);
    whole.to = std::max(whole.to, time.to);
  }
  return static_cast<double>(count) * sizeof(int64_t) * passes / (whole.to - whole.from) / 1e9;
}

// Nanoseconds that a cache line takes from one processor to another and back, the shortest of some
// means; 0 if threads cannot be kept on both here. Cores behind one last-level cache hand a line
// over in it; what is several times as long goes from one part of the processor to another.
double round_trip_ns(int first, int second) {
  constexpr int kAttempts = 10, kTrips = 2000;
  if (first == second) return 0.0;
  struct alignas(128) Ball {
    std::atomic<int> at{0};
  } ball;
  Start start(2);
  double best = 0.0;
  std::thread other([&] {
    if (!start.On(second)) return;
    for (int trip = 0; trip < kAttempts * kTrips; ++trip) {
      while (ball.at.load(std::memory_order_acquire) != 1) {
      }
      ball.at.store(0, std::memory_order_release);
    }
  });
  std::thread own([&] {
    if (!start.On(first)) return;
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      const double begin = Seconds(CLOCK_MONOTONIC);
      for (int trip = 0; trip < kTrips; ++trip) {
        ball.at.store(1, std::memory_order_release);
        while (ball.at.load(std::memory_order_acquire) != 0) {
        }
      }
      const double mean = (Seconds(CLOCK_MONOTONIC) - begin) / kTrips;
      best = attempt == 0 ? mean : std::min(best, mean);
    }
  });
  other.join();
  own.join();
  return best * 1e9;
}

}  // extern "C"
