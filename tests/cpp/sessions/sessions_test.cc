// Two sessions, which share their packed weights, are run by four threads at once: every result
// must be the one that a session gave alone. Meant for ThreadSanitizer.
//
//   sessions_test <libonnxruntime> <library of the ops> <model of make_model.py>
#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kChannelsIn = 640, kChannelsOut = 512;
constexpr int kUsers = 4, kRounds = 20;

const OrtApi* api;

void Check(OrtStatus* status) {
  if (status == nullptr) return;
  std::fprintf(stderr, "%s\n", api->GetErrorMessage(status));
  std::exit(1);
}

void* Load(const char* path) {
  void* library = dlopen(path, RTLD_NOW);
  if (library != nullptr) return library;
  std::fprintf(stderr, "%s\n", dlerror());
  std::exit(1);
}

const OrtApi* LoadRuntime(const char* path) {
  void* base = dlsym(Load(path), "OrtGetApiBase");
  const auto get = reinterpret_cast<const OrtApiBase* (*)()>(base);
  return get != nullptr ? get()->GetApi(ORT_API_VERSION) : nullptr;
}

OrtSession* MakeSession(OrtEnv* environment, const char* library, const char* model) {
  OrtSessionOptions* options = nullptr;
  Check(api->CreateSessionOptions(&options));
  Check(api->SetIntraOpNumThreads(options, 2));
  Check(api->RegisterCustomOpsLibrary_V2(options, library));
  OrtSession* session = nullptr;
  Check(api->CreateSession(environment, model, options, &session));
  api->ReleaseSessionOptions(options);
  return session;
}

// x of `rows` rows that hold every residue of a prime, so that no two are equal.
std::vector<float> Run(OrtSession* session, int64_t rows) {
  std::vector<float> x(static_cast<size_t>(rows * kChannelsIn));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 7919 % 4001) / 100.0f - 20.0f;
  const int64_t shape[] = {1, rows, kChannelsIn};
  OrtMemoryInfo* memory = nullptr;
  Check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  OrtValue *input = nullptr, *output = nullptr;
  Check(api->CreateTensorWithDataAsOrtValue(memory, x.data(), x.size() * sizeof(float), shape, 3,
                                            ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &input));
  const char* const input_name = "x";
  const char* const output_name = "y";
  Check(api->Run(session, nullptr, &input_name, &input, 1, &output_name, 1, &output));
  void* data = nullptr;
  Check(api->GetTensorMutableData(output, &data));
  std::vector<float> y(static_cast<size_t>(rows * kChannelsOut));
  std::memcpy(y.data(), data, y.size() * sizeof(float));
  api->ReleaseValue(output);
  api->ReleaseValue(input);
  api->ReleaseMemoryInfo(memory);
  return y;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  api = LoadRuntime(arguments[1]);
  if (api == nullptr) return 2;
  Load(arguments[2]);  // the sanitizers name its functions only while it is loaded
  OrtEnv* environment = nullptr;
  Check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "sessions_test", &environment));
  OrtSession* sessions[2] = {};
  for (OrtSession*& session : sessions) {  // not at once: the runtime's list of domains has no lock
    session = MakeSession(environment, arguments[2], arguments[3]);
  }
  const int64_t rows[] = {1, 3, 33, 70};
  std::vector<float> expected[4];
  for (int i = 0; i < 4; ++i) expected[i] = Run(sessions[0], rows[i]);
  std::atomic<int> wrong{0}, right{0};
  std::vector<std::thread> users;
  for (int user = 0; user < kUsers; ++user) {
    users.emplace_back([&, user] {
      for (int round = 0; round < kRounds; ++round) {
        const int i = (user + round) % 4;
        ++(Run(sessions[user % 2], rows[i]) == expected[i] ? right : wrong);
      }
    });
  }
  for (std::thread& user : users) user.join();
  for (OrtSession* session : sessions) api->ReleaseSession(session);
  api->ReleaseEnv(environment);
  std::printf("two sessions, four threads: %d runs right, %d wrong\n", right.load(), wrong.load());
  return wrong == 0 && right == kUsers * kRounds ? 0 : 1;
}
