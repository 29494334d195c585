# What the README tells people to type, and what CI types.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
SOURCES := $(shell find runtime_ops cmake -name '*.cc' -o -name '*.h' -o -name 'CMakeLists.txt' -o -name '*.cmake') CMakeLists.txt
PY := splitq_edge exporters runtime_ops tests models
TABLES := table-of-easyvqa-tiny table-of-easyvqa-tiny-stressed

SMOLVQA := build/models/smolvqa-135m
SMOLVQA_TABLE := --task all --limit 500 --epochs 4 --transform-lr 0.015 --results models/smolvqa-135m/results.json --work build/table-smolvqa --states build/states-smolvqa

.PHONY: demo trial-smollm2 table-easyvqa $(TABLES) table-smolvqa accuracy-smoke same-tokens test test-fast test-transformers test-wheel test-qnn test-qnn-accuracy test-web test-arm64 test-arm64-model test-js test-asan bench-kernels bench-model lint format docs-screenshot clean

demo: $(STAMP)
	$(BIN)/python models/easyvqa-tiny/demo.py --work build/demo

# One row for every method and scheme; rows that results.json holds already are kept, so an interrupted table goes on.
table-easyvqa: $(TABLES)

$(TABLES): table-of-%: $(STAMP)
	$(BIN)/splitq-edge table models/$* --task easyvqa --results models/$*/results.json --work build/table

# The method on a real language model, text only; needs apt (a Debian package is the prose) and two hours of a core.
trial-smollm2: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt gguf
	$(BIN)/python models/smollm2-135m/trial.py --work build/smollm2-135m

# The reference model as a Hugging Face folder, and the photos that two of its tasks ask about (apt and npm).
$(SMOLVQA)/config.json: $(STAMP) models/smolvqa-135m/delta.safetensors
	$(BIN)/python -m pip install --quiet -c constraints.txt gguf
	$(BIN)/python models/smolvqa-135m/build.py $(SMOLVQA)

# Every method and scheme on its six tasks, then the ablations; many hours, resumable row by row.
table-smolvqa: $(SMOLVQA)/config.json
	$(BIN)/python models/smolvqa-135m/fetch_data.py
	$(BIN)/splitq-edge table $(SMOLVQA) $(SMOLVQA_TABLE)
	$(BIN)/splitq-edge ablate $(SMOLVQA) $(SMOLVQA_TABLE) --scheme W3A3 --tables components,rules,mac
	$(BIN)/splitq-edge ablate $(SMOLVQA) $(SMOLVQA_TABLE) --scheme W3A2 --tables components,rules,mac
	$(BIN)/splitq-edge ablate $(SMOLVQA) $(SMOLVQA_TABLE) --scheme W4A4 --tables bits

# A fixed slice of that, without learning, against models/smolvqa-135m/smoke.json; fails when a number moved too far.
accuracy-smoke: $(SMOLVQA)/config.json
	$(BIN)/python models/smolvqa-135m/smoke.py $(SMOLVQA) --work build/smoke

test: $(DEV_STAMP)
	SPLITQ_EXPECT_NATIVE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadscope

TRANSFORMERS := 5.21 5.22 5.24

test-transformers: $(DEV_STAMP)
	SPLITQ_EXPECT_NATIVE=1 bash tests/packaging/test_transformers.sh $(BIN)/python $(TRANSFORMERS)

test-fast: $(DEV_STAMP)
	SPLITQ_EXPECT_NATIVE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadscope -m "not slow"

# Builds the wheel, installs it without torch and runs the demo's export with it.
test-wheel: $(STAMP)
	PYTHON=$(PYTHON) bash tests/packaging/check_wheel.sh

# Layers in ONNX Runtime beside its own and llama.cpp's, which it fetches and builds; an hour, and only of use on a
# machine that does nothing else. BENCH="--rows 1 --threads 1" and the like make it shorter.
bench-kernels: $(STAMP)
	bash tests/bench/peers/build.sh $(BIN)/python build/peers
	$(BIN)/python tests/bench/kernels.py --native build/peers/cmake/libbench_peers.so --json build/bench/kernels.json $(BENCH)

# Whole decoders beside onnxruntime-genai's and llama.cpp's, which it installs and builds; --shapes 1.5B takes 12 GB of
# disk and memory. BENCH="--threads 1 --prompt-tokens 256" and the like make it shorter.
bench-model: $(STAMP)
	CMAKE_ARGS=-DGGML_NATIVE=ON $(BIN)/python -m pip install --quiet --no-binary llama-cpp-python -c constraints.txt gguf llama-cpp-python onnxruntime-genai
	$(BIN)/python -m compileall -q splitq_edge exporters runtime_ops  # as the peers' modules are
	$(BIN)/python tests/bench/model.py --json build/bench/model.json $(BENCH)

# The portable flavour in onnxruntime-node and, on the demo page, in headless Chromium. Needs Node 18, npm and a network;
# without npm it tests nothing and says so, with SPLITQ_EXPECT_NODE=1 it fails. So does the page's test without Chromium.
test-web: $(DEV_STAMP)
	@if ! command -v npm >/dev/null; then echo "test-web: skipped, npm is not installed"; test -z "$$SPLITQ_EXPECT_NODE"; else \
	  mkdir -p build/web && cp docs/demo/package.json build/web && \
	  npm install --prefix build/web --ignore-scripts --no-audit --no-fund --loglevel=error && \
	  SPLITQ_WEB_MODULES=build/web OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/web; \
	fi

# The static graphs through Qualcomm's compiler and its emulator; x86-64 Linux, Python 3.11 or newer; about a minute.
test-qnn: $(DEV_STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt onnxruntime-qnn
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/unit/test_target_check.py tests/parity/test_static_export.py tests/parity/test_static_block.py

# 200 questions through compiled files on every target, beside the native kernels; about 15 minutes on an idle core.
# QNN=--resume goes on where a run was stopped, QNN="--targets qnn-htp:v73 --limit 20" and the like make it shorter.
test-qnn-accuracy: $(DEV_STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt onnxruntime-qnn
	OMP_NUM_THREADS=1 $(BIN)/python tests/qnn_accuracy.py $(QNN)

# The ARM64 kernels under qemu: needs g++-aarch64-linux-gnu and qemu-user.
test-arm64:
	bash tests/cpp/arm64.sh build/arm64

# easyvqa-tiny, exported here, answers the same tokens in ARM64's onnxruntime under qemu; needs Debian, the packages above
# and a network.
test-arm64-model: $(STAMP)
	bash tests/cpp/arm64_model/run.sh build/arm64-model $(BIN)/python

# easyvqa-tiny in transformers.js says what it says here; needs Node 18, npm and a network, as test-web does.
test-js: $(DEV_STAMP)
	@if ! command -v npm >/dev/null; then echo "test-js: skipped, npm is not installed"; test -z "$$SPLITQ_EXPECT_NODE"; else \
	  mkdir -p build/js && cp tests/js/package.json tests/js/answers.mjs build/js && \
	  npm install --prefix build/js --ignore-scripts --no-audit --no-fund --loglevel=error && \
	  SPLITQ_NODE_MODULES=build/js $(BIN)/python -m pytest -q tests/js; \
	fi

# The kernel tests and two sessions used by four threads, under the address, undefined-behaviour and thread sanitizers.
test-asan: $(STAMP)
	bash tests/cpp/sanitize.sh build/sanitize $(BIN)/python

# Fifty held-out questions to the reference model at W4A8, its decoder fused and in standard ops: all tokens must be equal.
same-tokens: $(SMOLVQA)/config.json
	$(BIN)/python models/smolvqa-135m/same_tokens.py $(SMOLVQA)

lint: $(DEV_STAMP)
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	bash tests/packaging/check_types.sh $(BIN)/mypy
	find runtime_ops tests/cpp \( -name '*.cc' -o -name '*.h' \) -print0 | xargs -0 $(BIN)/clang-format --dry-run --Werror

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)
	find runtime_ops tests/cpp \( -name '*.cc' -o -name '*.h' \) -print0 | xargs -0 $(BIN)/clang-format -i

# Opens build/demo's decoder in Netron (headless Chromium) and saves what it shows.
docs-screenshot:
	bash docs/netron/screenshot.sh

clean:
	rm -rf build dist $(VENV)

$(STAMP): pyproject.toml constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[quantize,export,tasks]'
	touch $@

$(DEV_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[quantize,export,tasks,dev]'
	touch $@
