# make demo: from nothing to a cross-validated Gene-DML with its report.   make test: all tests.
BASE_PYTHON := $(shell command -v python3.11 || command -v python3)
PYTHON := .venv/bin/python
PIP := $(PYTHON) -m pip install --disable-pip-version-check --progress-bar off --quiet -c requirements.lock
# Of a build of PyTorch other than the default, e.g. the one for CPUs: make setup TORCH_INDEX=URL
TORCH_INDEX :=
TOO_OLD := Gene-DML needs Python 3.11 or newer, and $(BASE_PYTHON) is %d.%d: name another, as in make setup BASE_PYTHON=python3.11
DEMO := demo
SOURCES := main.py engine.py modes models datasets evaluation preprocess utils

.PHONY: setup setup-dev demo test soak lint format docs bench clean

setup: .venv/installed

setup-dev: .venv/installed-dev

.venv/installed: requirements.txt requirements.lock
	@$(BASE_PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit("$(TOO_OLD)" % v if v < (3, 11) else 0)'
	$(BASE_PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(PIP) --no-deps --index-url $(TORCH_INDEX) torch torchvision)
	$(PIP) -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt requirements.lock
	$(PIP) -r requirements-dev.txt
	touch $@

demo: setup
	$(PYTHON) preprocess/simulate_demo.py --data_dir $(DEMO)/data
	$(PYTHON) preprocess/extract_features_uni.py --config demo/dml --mode internal --extract_mode all --data_dir $(DEMO)/data
	$(PYTHON) main.py --config_name demo/dml --mode train --k 8 --use_kmeans --data_dir $(DEMO)/data --log_path $(DEMO)/logs --run_name demo --resume
	$(PYTHON) preprocess/extract_features_uni.py --mode external --test_name demo_external --extract_mode all --views 1 --data_dir $(DEMO)/data
	$(PYTHON) main.py --mode external_test --test_name demo_external --model_path $(DEMO)/logs/demo/dml/demo --data_dir $(DEMO)/data
	$(PYTHON) main.py --mode predict --image $(DEMO)/data/test/demo_external/ST-imgs/X/X1/X1.jpg --model_path $(DEMO)/logs/demo/dml/demo --mpp 1.6 --pitch_um 100 --genes COL1A1,ERBB2 --out $(DEMO)/predicted/X1.h5ad --overwrite
	@echo "Report: $(DEMO)/logs/demo/dml/demo/report.html"

# One process a core, one thread each: threads of small tensors only wait for each other. What tests start is compiled once.
test: setup-dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Damaged files, kills, full disks, two processes at once; an hour. SEED=1 tries others.
SEED := 0
soak: setup-dev
	$(PYTHON) -m tests.soak --seed $(SEED) --files 25000

lint: setup-dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy $(SOURCES)

format: setup-dev
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# The pages and a reference as a site: site/index.html.
docs: setup-dev
	$(PYTHON) -m mkdocs build --strict --quiet

bench: setup
	for script in benchmarks/bench_*.py; do $(PYTHON) $$script || exit 1; done
	$(PYTHON) benchmarks/table.py

clean:
	rm -rf $(DEMO) site .pytest_cache .ruff_cache
