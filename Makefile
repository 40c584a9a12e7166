# SPDX-License-Identifier: MIT
# Everything below runs in .venv, which tools/bootstrap creates from wheels; ROS need not be installed.

PYTHON_IN_VENV := .venv/bin/python
# nodes, renderer and Fast DDS on this machine: see fpt_ros/environment.py
RUN := eval "$$($(PYTHON_IN_VENV) -m fpt_ros.environment)" && $(PYTHON_IN_VENV)
LINTED := fpt_model fpt_ros sim training launch benchmarks tests tools/bootstrap tools/run_entry_point setup.py
PYTEST_ARGS ?=

# The wheels have Fast DDS alone.
unexport RMW_IMPLEMENTATION
# A sourced ROS installation and the wheels crash when mixed.
ifdef ROS_DISTRO
unexport AMENT_PREFIX_PATH CMAKE_PREFIX_PATH LD_LIBRARY_PATH PYTHONPATH
endif

.PHONY: help bootstrap demo test lint format screenshots clean

help:
	@echo "make demo                          simulated camera, FPT node and a poke: writes demo/overlay.png"
	@echo "make demo IMAGE=file POKE=x,y,dx,dy  the same on your own picture (pixels)"
	@echo "make test [PYTEST_ARGS='-k flow']  all tests"
	@echo "make lint                          ruff and mypy"
	@echo "make format                        let ruff rewrite what it can"
	@echo "make screenshots                   the pictures of docs/viewing.md, from real nodes"
	@echo "make bootstrap                     only create or refresh .venv"
	@echo "make clean                         remove .venv, builds, caches and demo/; not data/, runs/, evaluation/"

bootstrap:
	@command -v python3 >/dev/null || { printf '%s\n' "[bootstrap] there is no python3. On Debian and Ubuntu install it with:" \
		"  sudo apt-get install python3 python3-venv" >&2; exit 1; }
	@tools/bootstrap

demo: bootstrap
	@$(RUN) -m fpt_ros.demo $(if $(IMAGE),--image "$(IMAGE)") $(if $(POKE),--poke="$(POKE)")

test: bootstrap
	@echo "[test] running the tests"
	@export FPT_BOOTSTRAPPED=1 && $(RUN) -m pytest $(PYTEST_ARGS)

lint: bootstrap
	$(PYTHON_IN_VENV) -m ruff check $(wildcard $(LINTED))
	$(PYTHON_IN_VENV) -m ruff format --check $(wildcard $(LINTED))
	$(PYTHON_IN_VENV) -m mypy

format: bootstrap
	$(PYTHON_IN_VENV) -m ruff check --fix $(wildcard $(LINTED))
	$(PYTHON_IN_VENV) -m ruff format $(wildcard $(LINTED))

screenshots: bootstrap
	@$(RUN) -m fpt_ros.screenshots

clean:
	rm -rf .venv .venv.lock build dist install log demo *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
