# Commands for developers. On Debian they install what is missing.

VENV := .venv
PYTHON ?= $(firstword $(foreach p,/usr/bin/python3 python3,$(shell $(p) -c 'import sys; print(sys.executable) if sys.version_info >= (3, 11) else None' 2>/dev/null)))
CLANG_MAJOR := 19
PACKAGES := gcc libc6-dev python3-dev python3-venv
TEST_PACKAGES := $(PACKAGES) bpftool clang-$(CLANG_MAJOR) clang-format-$(CLANG_MAJOR) libbpf-dev libclang-rt-$(CLANG_MAJOR)-dev ngtcp2-client curl iproute2 util-linux valgrind
KERNEL_PACKAGES := busybox-static qemu-system-x86
C_SOURCES := csrc/decide.h csrc/siphash.h csrc/types.h csrc/result.h $(foreach name,sockets loader spawn trace,csrc/$(name).h csrc/$(name).c) bpf/steer.bpf.c $(wildcard benchmarks/*.c tests/fuzz/*.c tests/fuzz/*.h tests/sanitizers/*.c)
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

.PHONY: test-kernels
test-kernels: $(VENV)/.test ## Run the promises on other kernels, emulated; REPLACE=20 also tries to crash them
	.ci/install-packages $(KERNEL_PACKAGES)
	cd tests && QUICSTEER_KERNELS=../.kernels QUICSTEER_REPLACE_SECONDS=$(REPLACE) ../$(VENV)/bin/pytest -c ../pyproject.toml --rootdir .. kernels -rP $(PYTEST)

.PHONY: bench
bench: $(VENV)/.bench ## Measure what steering costs, beside other servers' rules; BENCH="all --quick" for two minutes
	$(VENV)/bin/python setup.py -q build_ext --inplace
	$(VENV)/bin/python -m benchmarks $(or $(BENCH),all --json benchmarks/results)

.PHONY: fuzz
fuzz: $(VENV)/.test ## Fuzz the decision and every parser; SECONDS=600 for longer
	cd tests && QUICSTEER_FUZZ_SECONDS=$(or $(SECONDS),60) ../$(VENV)/bin/pytest -c ../pyproject.toml --rootdir .. fuzz -rP $(PYTEST)

.PHONY: soak
soak: $(VENV)/.test ## Let everything happen to a service under load; SECONDS=3600 for longer
	cd tests && QUICSTEER_SOAK_SECONDS=$(or $(SECONDS),600) ../$(VENV)/bin/pytest -c ../pyproject.toml --rootdir .. soak -rP $(PYTEST)

.PHONY: dist
dist: $(VENV)/.test ## Build the wheel, the same to the bit each time, and the list of what it ships
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(VENV)/bin/python -m build --outdir dist .
	for wheel in dist/*.whl; do .ci/bill-of-materials $$wheel > $$wheel.cdx.json || exit 1; done

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

$(VENV)/.bench: $(VENV)/.test
	$(VENV)/bin/pip install -q '.[bench]'
	touch $@

$(VENV)/.test: $(VENV)/bin/pip $(SOURCES)
	.ci/install-packages $(TEST_PACKAGES)
	$(VENV)/bin/pip install -q --force-reinstall --no-deps .
	$(VENV)/bin/pip install -q '.[test]'
	touch $@
