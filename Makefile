# make demo: a small, real SPARK run on this machine; make demo-zero3: the same, sharded over two processes;
# make test: the test suite; make test-distributed: the tests that start several processes; make test-slow: long ones;
# make test-newest: the test suite with the newest version of everything; make test-browser: those that drive Chromium;
# make test-vllm: the rollout engine on real vLLM;
# make fuzz: hostile input, for FUZZ_SECONDS; make lint: style and types;
# make audit: known vulnerabilities of what is installed.
# Each does its own set-up. PYTHON names the interpreter that makes .venv.

PYTHON ?= python3
BIN := .venv/bin
# DeepSpeed compiles a part of itself at its first start, and looks for ninja on the path.
WITH_BIN := PATH="$(CURDIR)/$(BIN):$$PATH"
# One thread a process: small tensors gain nothing from more.
export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-zero3 test test-distributed test-slow test-newest test-vllm test-browser fuzz audit lint format checkpoint clean

.venv/.installed: setup.cfg constraints.txt
	@echo "installs about 6 GB into .venv; this takes minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[demo]" --constraint constraints.txt
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install --quiet --editable ".[test]" --constraint constraints.txt
	touch $@

demo: .venv/.installed
	rm -rf runs/demo
	$(BIN)/python -m spark_vl train --config scripts/configs/digits/spark.yaml --output_dir runs/demo

demo-zero3: .venv/.installed
	rm -rf runs/digits-zero3
	$(WITH_BIN) scripts/launch/spark_tiny_cpu.sh

# A file's tests stay together: what they share is made once.
test: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-distributed: .venv/.installed-test
	$(WITH_BIN) $(BIN)/python -m pytest -m distributed tests/distributed

test-slow: .venv/.installed-test
	$(BIN)/python -m pytest -m "slow and not distributed and not gpu"

# In an environment of its own, without constraints.txt: what a new version breaks is found before users meet it.
test-newest:
	$(PYTHON) -m venv .venv/newest
	.venv/newest/bin/python -m pip install --quiet --upgrade pip
	.venv/newest/bin/python -m pip install --quiet --upgrade --editable ".[test]"
	.venv/newest/bin/python -m pytest -n 2 --dist loadfile

# In an environment of its own (3 GB), with real vLLM on CPUs; tests/vllm/environment.py says what it is made of.
.venv/vllm/.installed: setup.cfg tests/vllm/environment.py
	$(PYTHON) -m venv .venv/vllm
	.venv/vllm/bin/python -m pip install --quiet --upgrade pip packaging
	.venv/vllm/bin/python tests/vllm/environment.py
	touch $@

test-vllm: .venv/vllm/.installed
	PATH="$(CURDIR)/.venv/vllm/bin:$$PATH" .venv/vllm/bin/python -m pytest -m vllm tests/vllm

# Debian: apt-get install chromium chromium-driver
test-browser: .venv/.installed-test
	$(BIN)/python -m pytest -m browser tests/browser

# FUZZ_SECONDS is 60 if not given. Other inputs each time; FUZZ_SEED, which is said with each finding, brings the same ones back.
fuzz: .venv/.installed-test
	$(BIN)/python -m tests.fuzz

# Asks PyPI's list of known vulnerabilities about each package that is installed; needs the network. Not part of `lint`
# or of CI: a new entry there says nothing about a change here. pip-audit has a folder
# of its own, and a package that it cannot ask about is an error.
audit: .venv/.installed
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//' > .venv/audit/installed.txt
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement .venv/audit/installed.txt

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

format: .venv/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Rebuilds the demo's warm-started checkpoint from the digits.
checkpoint: .venv/.installed
	$(BIN)/python scripts/build_tiny_checkpoint.py

clean:
	rm -rf .venv runs build dist *.egg-info
