# Commands for developers. On Debian they install what is missing.

VENV := .venv
PYTHON ?= $(firstword $(foreach p,/usr/bin/python3 python3,$(shell $(p) -c 'import sys; print(sys.executable) if sys.version_info >= (3, 11) else None' 2>/dev/null)))
CLANG_MAJOR := 19
PACKAGES := gcc libc6-dev python3-dev python3-venv
TEST_PACKAGES := $(PACKAGES) bpftool clang-$(CLANG_MAJOR) clang-format-$(CLANG_MAJOR) libbpf-dev ngtcp2-client curl iproute2 util-linux
C_SOURCES := csrc/decide.h csrc/siphash.h csrc/types.h csrc/result.h $(foreach name,sockets loader spawn trace,csrc/$(name).h csrc/$(name).c) bpf/steer.bpf.c
SOURCES := setup.py pyproject.toml MANIFEST.in $(wildcard quicsteer/*.py quicsteer/*.pyx quicsteer/*.pyi csrc/* bpf/*.h)

.PHONY: help
help: ## Show these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

.PHONY: demo
demo: $(VENV)/.demo ## Show what steering does: 100 real QUIC connections whose addresses change
	@cd $(VENV) && bin/quicsteer demo $(DEMO)

.PHONY: test
test: $(VENV)/.test ## Run all tests on the installed wheel
	cd tests && QUICSTEER_REQUIRE_KERNEL=$${QUICSTEER_REQUIRE_KERNEL:-$${CI:+1}} ../$(VENV)/bin/pytest -c ../pyproject.toml --rootdir .. . $(PYTEST)

.PHONY: test-browser
test-browser: $(VENV)/.test ## Run headless Chromium against the hypercorn integration
	.ci/install-packages chromium chromium-driver
	cd tests && QUICSTEER_REQUIRE_BROWSER=1 ../$(VENV)/bin/pytest -c ../pyproject.toml --rootdir .. browser -s $(PYTEST)

.PHONY: lint
lint: $(VENV)/.test ## Check types, style, warnings and generated files
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	cd tests && MYPYPATH=.. ../$(VENV)/bin/stubtest quicsteer._kernel
	clang-format-$(CLANG_MAJOR) --dry-run -Werror $(C_SOURCES)
	for file in sockets loader spawn trace; do $(CC) -std=gnu11 -O2 -Wall -Wextra -Werror -Icsrc -Ibpf -c csrc/$$file.c -o /dev/null || exit 1; done
	$(VENV)/bin/python bpf/build.py --check

.PHONY: bpf
bpf: $(VENV)/.test ## Compile the eBPF program into csrc/program.h
	$(VENV)/bin/python bpf/build.py

.PHONY: develop
develop: $(VENV)/bin/pip ## Install editable, for working on the sources
	.ci/install-packages $(TEST_PACKAGES)
	$(VENV)/bin/pip install -q -e '.[test]'

.PHONY: clean
clean: ## Remove everything that these commands made
	rm -rf $(VENV) build dist *.egg-info quicsteer/_kernel.c quicsteer/*.so

$(VENV)/bin/pip:
	.ci/install-packages $(PACKAGES)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/pip $(SOURCES)
	$(VENV)/bin/pip install -q --force-reinstall --no-deps .
	$(VENV)/bin/pip install -q '.[aioquic]'
	touch $@

$(VENV)/.test: $(VENV)/bin/pip $(SOURCES)
	.ci/install-packages $(TEST_PACKAGES)
	$(VENV)/bin/pip install -q --force-reinstall --no-deps .
	$(VENV)/bin/pip install -q '.[test]'
	touch $@
