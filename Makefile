PYTHON ?= python3
BIN := .venv/bin

.PHONY: study test test-slurm lab clean

study: .venv/installed  ## the main job on the embedded tiny model: figures in runs/study/index.html
	$(BIN)/rspo-lab sweep notebooks/studies/study.yaml

test: .venv/reasoning_gym  ## lint and tests
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slurm: .venv/installed  ## sweeps on a real Slurm of one node, which it installs (root, Debian)
	$(BIN)/python -m pytest -s tests/slurm_end_to_end.py

lab: .venv/kernel  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

.venv/kernel: .venv/installed  # this environment under a name of its own in the menu of kernels
	$(BIN)/python -m ipykernel install --sys-prefix --name rspo-lab --display-name "rspo-lab (.venv)"
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[test]
	touch $@

.venv/reasoning_gym: .venv/installed  # a dependency of it, pycosat, comes as C: without a compiler its tests are skipped
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .[reasoning-gym] || echo "no reasoning_gym: see above"
	touch $@

clean:  ## everything but the sources and runs/
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
