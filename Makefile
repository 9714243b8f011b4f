# `make demo` and `make test` need only python 3.11 (or newer), pip and make: each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.ready

.PHONY: ablation clinic demo dashboard-demo figures bench-dashboard bench-probe bench-modes bench-idle test test-integrations test-slow lint clean

$(SETUP): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(SETUP)  ## bare AdamW beside the wrapped one on real MNIST images, healthy and sick (under 3 minutes)
	$(BIN)/python scripts/demo.py

dashboard-demo: $(SETUP)  ## the dashboard on http://127.0.0.1:8050/ while a sick run is treated
	$(BIN)/python scripts/dashboard_demo.py

bench-dashboard: $(SETUP)  ## first paint, update and memory on a run of 100,000 lines (needs Chromium)
	$(BIN)/python scripts/bench_dashboard.py

ablation: $(SETUP)  ## policies, and each component switched off in turn: 9 workloads, 16 arms, 6 seeds; resumable
	$(BIN)/python experiments/train.py -m study=ablation
	$(BIN)/python scripts/ablate.py runs/ablation

clinic: $(SETUP)  ## sick and healthy runs: bare, the human fix, the rules, other policies, a peer (under 10 minutes); the whole table: scripts/clinic.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	OMP_NUM_THREADS=1 $(BIN)/python scripts/clinic.py --quick

figures: $(SETUP)  ## the article's figures, computed: docs/figures.md (a few minutes)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/figures.py

test: $(SETUP)  ## the default suite (under 6 minutes on 2 cores)
	$(BIN)/python -m pytest

test-integrations: $(SETUP)  ## Hugging Face, Accelerate, Lightning, sinks, PyTorch's contracts over third-party bases: the real libraries
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[integrations]"
	$(BIN)/python -m pytest tests/integrations

test-slow: $(SETUP)  ## the long checks
	$(BIN)/python -m pytest -m slow

bench-probe: $(SETUP)  ## the curvature engine beside PyHessian, hessian-eigenthings and curvlinops (about 12 minutes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	OMP_NUM_THREADS=1 $(BIN)/python scripts/bench_probe.py --figure docs/bench_probe.png

bench-modes: $(SETUP)  ## the modes beside the bare base and the peers on five workloads (35 minutes of one core; goes on where it was cut off)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	OMP_NUM_THREADS=1 $(BIN)/python scripts/bench_modes.py --figure docs/bench_modes.png

bench-idle: $(SETUP)  ## what the wrapper costs when it has nothing to do (a minute)
	OMP_NUM_THREADS=1 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000 $(BIN)/python scripts/bench_idle.py

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf .venv runs outputs multirun
