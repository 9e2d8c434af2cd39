# make demo: from nothing to a cross-validated Gene-DML with its report.   make test: all tests.
BASE_PYTHON := $(shell command -v python3.11 || command -v python3)
PYTHON := .venv/bin/python
DEMO := demo
SOURCES := main.py engine.py modes models datasets evaluation preprocess utils

.PHONY: setup setup-dev demo test soak lint format bench clean

setup: .venv/installed

setup-dev: .venv/installed-dev

.venv/installed: requirements.txt
	$(BASE_PYTHON) -m venv .venv
	$(PYTHON) -m pip install --disable-pip-version-check --progress-bar off --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PYTHON) -m pip install --disable-pip-version-check --progress-bar off --quiet -r requirements-dev.txt
	touch $@

demo: setup
	$(PYTHON) preprocess/simulate_demo.py --data_dir $(DEMO)/data
	$(PYTHON) preprocess/extract_features_uni.py --config demo/dml --mode internal --extract_mode all --data_dir $(DEMO)/data
	$(PYTHON) main.py --config_name demo/dml --mode train --k 8 --use_kmeans --data_dir $(DEMO)/data --log_path $(DEMO)/logs --run_name demo --resume
	$(PYTHON) preprocess/extract_features_uni.py --mode external --test_name demo_external --extract_mode all --views 1 --data_dir $(DEMO)/data
	$(PYTHON) main.py --mode external_test --test_name demo_external --model_path $(DEMO)/logs/demo/dml/demo --data_dir $(DEMO)/data
	$(PYTHON) main.py --mode predict --image $(DEMO)/data/test/demo_external/ST-imgs/X/X1/X1.jpg --model_path $(DEMO)/logs/demo/dml/demo --mpp 1.6 --pitch_um 100 --genes COL1A1,ERBB2 --out $(DEMO)/predicted/X1.h5ad --overwrite
	@echo "Report: $(DEMO)/logs/demo/dml/demo/report.html"

# One process a core, one thread each: threads of small tensors only wait for each other.
test: setup-dev
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist loadfile

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

bench: setup
	for script in benchmarks/bench_*.py; do $(PYTHON) $$script || exit 1; done
	$(PYTHON) benchmarks/table.py

clean:
	rm -rf $(DEMO) .pytest_cache .ruff_cache
