# make demo: compare BP, DFA, DKP and frozen features on the embedded images (creates .venv first)
# make test: everything that CI runs
# make nightly: every variation of every test, and many more generated examples
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
# most files of these packages are never imported: those that are get compiled then
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile $(PIP_FLAGS) -c constraints.txt

# images of containers often forbid Python to keep what it compiled: each process would then compile PyTorch again, for seconds
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint types unit nightly clients docs dist end-to-end mutations bench-step bench-classes bench-depth bench-vgg-memory clean

demo: .venv/demo
	$(BIN)/feedbackward compare --config demo --out runs/demo --overwrite

test: export SITE = $(CURDIR)/build/site
test: lint types docs unit end-to-end

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: .venv/dev
	$(BIN)/mypy

# three for two cores: many tests wait for processes of their own
TESTERS = $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) * 3 + 1) / 2 )))

unit: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TESTERS) --dist worksteal --quick

nightly: .venv/dev dist
	NIGHTLY=1 $(BIN)/pytest -n auto --dist worksteal -o timeout=0

# the site, in build/site; a link that leads nowhere is an error
docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# the tools that people use feedbackward in: their tests, and the examples of docs/integrations.md
clients: .venv/clients
	CLIENTS=1 $(BIN)/pytest -n 0 tests/clients

# wheel and source distribution, in dist/: their page, and tests from the one on the other
dist: .venv/dist
	rm -rf dist build/lib
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tools/check_dist.py

# every one-line defect of tests/support/mutations.py must be caught: about half an hour on an idle core
mutations: .venv/dev
	MUTATIONS=1 $(BIN)/pytest -n 0 tests/core/test_mutations.py

end-to-end: .venv/dev
	$(BIN)/feedbackward compare --config smoke --out runs/smoke --overwrite

bench-step: .venv/dev
	$(BIN)/feedbackward cost vgg16 --measure --rules '[dfa,{rule: dkp, options: {center: false, whiten: false, orthogonal: false, operator: {name: dense}}},dkp]' --schedules joint,replay \
		--batch 64 --rounds 9 --threads 2 --json bench/results/step_time.json --plot runs/step_time.png

bench-classes: .venv/dev
	$(BIN)/feedbackward cost vgg16 --measure --classes 200 --rules dfa,dkp \
		--operators '[dense,{name: low_rank, rank: 8},{name: per_shape, maps: pooled, vectors: dense},sparse]' \
		--batch 64 --rounds 7 --threads 2 --json bench/results/classes.json

bench-depth: .venv/dev
	$(BIN)/feedbackward cost resnet20 resnet110 --measure --rules dkp,drtp --schedules replay,eager \
		--batch 128 --rounds 7 --threads 2 --json bench/results/depth.json

bench-vgg-memory: .venv/dev
	$(BIN)/feedbackward cost vgg16 --measure --rules dkp,drtp --schedules joint,replay,eager --batch 128 --rounds 7 --threads 2 \
		--json bench/results/vgg_memory.json

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e '.[experiment]'
	@touch $@

.venv/dev: .venv/demo
	$(INSTALL) -e '.[experiment,dev,docs]'
	@touch $@

.venv/clients: .venv/dev
	$(INSTALL) -e '.[clients]'
	@touch $@

.venv/dist: .venv/dev
	$(INSTALL) -e '.[dist]'
	@touch $@

clean:
	rm -rf .venv runs build dist src/*.egg-info
