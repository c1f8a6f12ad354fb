# Each verb works on a fresh machine: it makes its own environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= $(error give DATA=folder of a data set in VOC layout)
RUN ?= runs/voc-animals
QUICK ?= --quick
# In a process of its own. After all of tests/export in one process, OpenVINO 2026.4 ends with a segmentation fault (a
# jump of the main thread to the address 0x87f6, on an AMD EPYC without AMX), at the end of its tests; after
# tests/export/test_export_tensorrt.py alone, or by itself, it does not.
OPENVINO_TESTS := tests/runtime/test_runtime_openvino.py
# About half the time of all others.
HALF := tests/kernels tests/export tests/training

.PHONY: demo test check docs bench train clean

demo: $(VENV)/base  ## label and segment the images that come with the package
	$(BIN)/multisa demo -o demo-out

test: $(VENV)/dev $(VENV)-importers/ready  ## static checks, then the test suite
	$(MAKE) --no-print-directory check
	mkdir -p build
	$(MAKE) --no-print-directory --keep-going --jobs 2 .test-rest .test-half; status=$$?; cat build/tests.log; exit $$status
	$(BIN)/python -m pytest $(OPENVINO_TESTS)

# Side by side, by make: sh would start the one in the background with SIGINT ignored, which tests send.
.test-rest:
	$(BIN)/python -m pytest $(addprefix --ignore ,$(HALF) $(OPENVINO_TESTS))

.test-half:
	@$(BIN)/python -m pytest $(HALF) > build/tests.log 2>&1

check: $(VENV)/dev  ## format, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/typecheck && ln -sfn ../.. build/typecheck/multisa
	MYPYPATH=build/typecheck $(BIN)/mypy -p multisa.kernels -p multisa.runtime -p multisa.training -p multisa.export -p multisa.benchmarks

docs: $(VENV)/dev  ## build the pages of docs/ into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/dev  ## measure on this machine and refresh benchmarks/results; make bench QUICK= takes an hour
	$(BIN)/multisa bench $(QUICK) --data $(DATA) --stages segment -o build/bench-segment
	cp build/bench-segment/bench.json benchmarks/results/segmenting.json
	$(BIN)/multisa bench $(QUICK) --data $(DATA) --stages label -o build/bench-label
	cp build/bench-label/bench.json benchmarks/results/labelling.json
	$(BIN)/multisa bench $(QUICK) --data $(DATA) --stages kernels -o build/bench-kernels
	cp build/bench-kernels/bench.json benchmarks/results/kernels.json
	$(BIN)/python benchmarks/cam_head.py $(QUICK)
	$(BIN)/python benchmarks/start_up.py $(QUICK)
	$(BIN)/python benchmarks/tables.py

train: $(VENV)/dev  ## train, measure and export the bundle of the package: make train DATA=folder
	$(BIN)/multisa train --data $(DATA) --preset lite0 --set name=voc-animals -o $(RUN)
	$(BIN)/multisa export $(RUN) --data $(DATA) -o $(RUN)-fp32 --known-failures benchmarks/results/known-failures.md
	# int8 needs a processor with VNNI.
	$(BIN)/multisa convert $(RUN)-fp32 --precision int8 --images $(DATA) -o runtime/bundles/voc-animals
	cp $(RUN)/run.json benchmarks/results/voc-animals.json

clean:  ## remove the environment and everything generated
	rm -rf $(VENV) $(VENV)-importers $(VENV)-gpu build demo-out *.egg-info .pytest_cache .mypy_cache .ruff_cache kernels/*.so kernels/cuda/kernels.fatbin kernels/cuda/kernels.json

# The CPU kernels are compiled on the way (g++ or clang). The CUDA kernels, minutes of nvcc, are not unless
# MULTISA_CUDA=1 is set: nothing here runs on a GPU, and the tests compile them for themselves.
KERNELS := setup.py $(wildcard kernels/csrc/cpu/*)

$(VENV)/base: pyproject.toml $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# torch first and pinned: the other packages then take the build that is there.
$(VENV)/dev: pyproject.toml constraints.txt $(KERNELS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# Calls to TensorRT are held to these stubs. They ask for TensorRT itself, which is on NVIDIA's index only.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps tensorrt-stubs
	touch $@ $(VENV)/base

# The tests read formats back with these libraries; beside onnx they cannot be installed.
$(VENV)-importers/ready: tests/importers/requirements-importers.txt
	$(PYTHON) -m venv $(VENV)-importers
	$(VENV)-importers/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@
