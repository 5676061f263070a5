# make demo   the four scripts on the bundled miniature: pictures and a table under outputs/
# make test   the tests, offline
# make test-faults  the long campaigns of faults, offline
# make test-oldest, make test-newest  the tests with the oldest and the newest libraries of requirements.txt, in
#             environments of their own; TESTS="tests/scripts" runs some of them (docs/systems.md)
# make test-app  the tests of the page, in an environment with Gradio
# make check  ruff, ruff format, mypy, and import-linter: which room may import which
# make lock, make audit  the libraries' versions and hashes, anew; known vulnerabilities of what is locked
# make miniature  trains the bundled model anew; half an hour of a large GPU, in pieces: run it again to go on
PYTHON ?= python3
BIN := .venv/bin

TESTS ?=

.PHONY: demo test test-faults test-app test-oldest test-newest check lock audit format clean miniature
demo: .venv/installed
	$(BIN)/python examples/demo.py --output_dir outputs/demo

test: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-faults: .venv/installed-dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m faults

test-oldest test-newest: test-%: .venv-%/installed
	HF_HUB_OFFLINE=1 .venv-$*/bin/python -m pytest -n 2 --dist worksteal -p no:cacheprovider $(TESTS)

test-app: .venv-app/installed
	HF_HUB_OFFLINE=1 .venv-app/bin/python -m pytest tests/projects tests/scripts/test_app.py

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Each step is skipped where its file is there. The Python must have a torch that sees the GPU.
WORK ?= outputs/miniature
MINUTES ?= 20
STOP_AFTER ?= inf
RECIPE_PYTHON ?= $(BIN)/python
RENDERS = $(WORK)/npm/package/assets
miniature: $(WORK)/vae.json $(WORK)/judge.json $(WORK)/text.json
	$(RECIPE_PYTHON) miniature/train_transformer.py --renders $(RENDERS) --work $(WORK) --minutes $(MINUTES) --stop_after $(STOP_AFTER)
	cp $(WORK)/judge.* miniature/
	$(RECIPE_PYTHON) miniature/architecture.py --components $(WORK)
	$(RECIPE_PYTHON) miniature/evaluate.py --guidance 2.5 4 6 --result $(WORK)/evaluate.json --sheet $(WORK)/sheet.png
$(RENDERS):
	mkdir -p $(WORK)/npm
	npm pack --silent --pack-destination $(WORK)/npm @lobehub/fluent-emoji-3d@1.1.0
	tar xzf $(WORK)/npm/lobehub-fluent-emoji-3d-1.1.0.tgz -C $(WORK)/npm
$(WORK)/pool.safetensors:
	mkdir -p $(WORK)
	$(RECIPE_PYTHON) miniature/pool.py --output_path $@
$(WORK)/text.json: $(WORK)/pool.safetensors
	$(RECIPE_PYTHON) miniature/train_text.py --work $(WORK)
$(WORK)/vae.json: | $(RENDERS)
	$(RECIPE_PYTHON) miniature/train_vae.py --renders $(RENDERS) --output_dir $(WORK)
$(WORK)/judge.json: | $(RENDERS)
	$(RECIPE_PYTHON) miniature/train_judge.py --renders $(RENDERS) --output_path $(WORK)/judge.safetensors

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Where the lock holds, every file is checked against its hash. torch is not in it, nor CUDA's libraries, which come with
# it: its builds (for a CPU, for CUDA, a machine's own) have one version and other hashes. What pip finds missing after
# that, it installs by constraints.txt.
LOCKED = $(filter Linux-x86_64-11 Linux-x86_64-12 Linux-x86_64-13,$(shell uname -s)-$(shell uname -m)-$(shell \
	$(PYTHON) -c 'import sys; print(sys.version_info.minor)'))
UNLOCKED = echo "no lock for this system or Python (Linux x86-64 with 3.11 to 3.13 has one): installing by constraints.txt"
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check install
.venv/installed: requirements.txt constraints.txt requirements.lock
	$(PYTHON) -m venv .venv
	@$(if $(LOCKED),set -x; $(PIP) --no-deps --require-hashes -r requirements.lock,$(UNLOCKED))
	$(PIP) -r requirements.txt -c constraints.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt requirements-dev.lock
	@$(if $(LOCKED),set -x; $(PIP) --no-deps --require-hashes -r requirements-dev.lock,$(UNLOCKED))
	$(PIP) -r requirements-dev.txt -c constraints.txt
	touch $@

# The locks, for all systems and Pythons that the libraries have; what is in them stays, unless UPGRADE=--upgrade.
CUDA := bindings pathfinder toolkit
NVIDIA := cublas cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 \
	nccl-cu13 nvjitlink nvshmem-cu13 nvtx
UNHASHED := torch triton $(CUDA:%=cuda-%) $(NVIDIA:%=nvidia-%)
UV = .venv-lock/bin/uv --quiet --native-tls
lock: .venv-lock/installed
	$(foreach name,requirements requirements-dev,$(UV) pip compile --universal --generate-hashes --python-version 3.11 \
		--python $(PYTHON) --no-annotate --custom-compile-command "make lock" $(UPGRADE) -c constraints.txt \
		$(UNHASHED:%=--no-emit-package %) $(name).txt -o $(name).lock;)

# Asks PyPI for known vulnerabilities of what is locked.
audit: .venv-lock/installed
	.venv-lock/bin/pip-audit --vulnerability-service pypi --no-deps --disable-pip --requirement requirements-dev.lock

.venv-lock/installed: Makefile
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.13' 'pip-audit>=2.10'
	touch $@

# torch is that of constraints.txt in both: PyPI's other builds for Linux bring 3 GB of CUDA. Another: TORCH=torch==2.6.0
TORCH ?= $(shell grep '^torch==' constraints.txt)
.venv-oldest/installed .venv-newest/installed: .venv-%/installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv --clear .venv-$*
	echo '$(TORCH)' > .venv-$*/constraints.txt
	$(if $(filter oldest,$*),sed -nE '/^torch>/d; s/^([A-Za-z_0-9]+)>=([0-9.]+).*/\1==\2/p' requirements.txt >> .venv-$*/constraints.txt)
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c .venv-$*/constraints.txt
	touch $@

# Gradio wants an older Pillow than that of constraints.txt.
.venv-app/installed: requirements-app.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv --clear .venv-app
	grep -vi '^pillow==' constraints.txt > .venv-app/constraints.txt
	.venv-app/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-app.txt -r requirements-dev.txt \
		-c .venv-app/constraints.txt
	touch $@

clean:
	rm -rf .venv .venv-app .venv-oldest .venv-newest .venv-lock outputs
