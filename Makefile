# shadowbell: build, check, test. `make help` lists the targets.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS   += --no-print-directory

GO ?= go
# No cgo anywhere, except that the race detector needs it.
export CGO_ENABLED := 0
# A checkout that belongs to another user, as in containers, must build all the same.
export GOFLAGS := $(GOFLAGS) -buildvcs=false

# Tools are pinned here and run from their modules, so that go.mod does not carry them.
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK := golang.org/x/vuln/cmd/govulncheck@v1.8.0

BINARIES := $(notdir $(wildcard tools/hostmed tools/guestdrv tools/nvmetrace tools/conformance))
SOURCES  := $(wildcard shared guestdrv hostmed ebpf tools)

FUZZTIME ?= 10s
SOAKTIME ?= 60s
# Everything of ours but the Promela models and most tools: what runs on heap memory when a test asks for it.
RACE_PACKAGES = $$($(GO) list ./shared/... ./guestdrv/... ./hostmed/... ./ebpf/path ./ebpf/doctor ./tools/inproc/... | grep -v '/dbbuf/model$$')

##@ Use
.PHONY: run
run: build ## the demonstration: store FILE (default: a binary at hand), compare, measure trap against shadow
	@$(GO) run ./tools/demo --bin bin $(if $(FILE),--file "$(FILE)") $(ARGS)

.PHONY: build
build: ## static binaries in bin/
	@mkdir -p bin
	$(if $(BINARIES),$(GO) build -trimpath -o bin/ $(addprefix ./tools/,$(BINARIES)),@echo "build: no program in tools/ yet")

.PHONY: vm
vm: build ## a shell in a Linux guest with a disk of hostmed's in it (ARGS=… for tools/vmlab, such as --doorbells mmap)
	@$(GO) run ./tools/vmlab/cmd shell $(ARGS)

.PHONY: doorbells
doorbells: build ## what doorbells cost in a stock guest, as a table and docs/doorbells.svg (ARGS=--runtime 5s)
	@$(GO) run ./tools/vmlab/cmd doorbells --plot docs/doorbells.svg $(ARGS)

.PHONY: trace-demo
trace-demo: ## what nvmetrace top, latency and path show in a guest under load; draws docs/latency-heatmap.png and docs/path.svg
	@$(GO) run ./tools/vmlab/cmd trace-demo --heat docs/latency-heatmap.png --path docs/path.svg $(ARGS)

.PHONY: tracebench
tracebench: ## what nvmetrace costs the load that it looks at, in a guest (ARGS='--rounds 9 --json')
	@$(GO) run ./tools/vmlab/cmd tracebench $(ARGS)

.PHONY: bench
bench: ## the benchmark table and its JSON (ARGS=… for tools/bench)
	@$(GO) run ./tools/bench $(ARGS)

.PHONY: guestbench
guestbench: ## the same load in one guest on the kernel's driver, guestdrv with ublk and with NBD, and the library (ARGS='--rounds 5 --json')
	@$(GO) run ./tools/vmlab/cmd guestbench $(ARGS)

.PHONY: backendbench
backendbench: ## what hostmed costs between a guest and an NVMe device, by backend, against the ways without it (ARGS='--rounds 5 --json')
	@$(GO) run ./tools/vmlab/cmd backendbench $(ARGS)

##@ Check
.PHONY: check
check: fmt vet ## quick, under 2 minutes: gofmt, vet, build, short tests
	$(GO) build ./...
	@# More at a time than cores: half of their time tests wait.
	$(GO) test -short -p 4 -timeout 100s ./...

.PHONY: test
test: deps race lab ## all tests: with the race detector, then as shipped, virtual machines too (installs spin and gcc where it can)
	$(GO) test -timeout 8m $$($(GO) list ./... | grep -v '/tools/vmlab')
	$(GO) test -tags shadowbell_faults -timeout 8m -run 'TestBroken' ./hostmed
	@# One at a time: two cores are one for the guest and one for hostmed.
	$(GO) test -timeout 20m -p 1 ./tools/vmlab/...
	$(GO) test -tags shadowbell_faults -timeout 8m -run 'TestHangingGuest' ./tools/vmlab/doctor

# Short: the detector sees a race in few rounds as in many. No test of RACE_PACKAGES may skip for it (tools/lint); `make test` runs them all in full without the detector.
.PHONY: race
race: # with cgo and gcc; without gcc a failure in CI, elsewhere a line that says so
	@if command -v gcc >/dev/null; then \
		echo "go test -race (packages that run on heap memory)"; \
		CGO_ENABLED=1 $(GO) test -race -short -timeout 8m $(RACE_PACKAGES); \
	elif [ "$${CI:-}" = true ]; then \
		echo "race: gcc is missing and CI must not skip" >&2; exit 1; \
	else \
		echo "race: NOT RUN, gcc is missing"; \
	fi

.PHONY: lint
lint: fmt vet staticcheck tidy ## gofmt, go vet, staticcheck, go mod tidy -diff; govulncheck if its database can be reached
	@$(MAKE) vuln VULN_OFFLINE=pass

.PHONY: fmt
fmt:
	@out=$$(gofmt -l $(SOURCES)); [ -z "$$out" ] || { echo "not gofmt'ed:"; echo "$$out"; exit 1; }

.PHONY: vet
vet:
	$(GO) vet ./...
	@# What breaks doorbell rules on purpose, for tests of what notices.
	$(GO) vet -tags shadowbell_faults ./...

.PHONY: staticcheck
staticcheck:
	$(GO) run $(STATICCHECK) ./...

.PHONY: tidy
tidy:
	$(GO) mod tidy -diff

.PHONY: vuln
vuln: ## govulncheck; fails when the vulnerability database cannot be reached
	@if out=$$($(GO) run $(GOVULNCHECK) ./... 2>&1); then \
		echo "$$out"; \
	elif grep -q '^govulncheck: fetching vulnerabilities' <<<"$$out"; then \
		echo "vuln: NOT CHECKED, the vulnerability database cannot be reached: $$(grep -m1 '^govulncheck:' <<<"$$out")"; \
		[ "$(VULN_OFFLINE)" = pass ]; \
	else \
		echo "$$out" >&2; exit 1; \
	fi

##@ Longer
.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME (10s) each
	@targets=$$($(GO) test -list '^Fuzz' ./... | awk '/^Fuzz/ { f[n++] = $$1 } /^ok/ { for (i = 0; i < n; i++) print $$2, f[i]; n = 0 }'); \
	[ -n "$$targets" ] || { echo "fuzz: no targets"; exit 0; }; \
	while read -r package target; do \
		echo "fuzz $$package $$target"; \
		$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) "$$package" </dev/null; \
	done <<<"$$targets"

.PHONY: soak
soak: build ## bench --verify, mixed sizes, for SOAKTIME (60s) each: mem and file, in all three doorbell modes
	@dir=$$(mktemp -d); pid=; trap '[ -z "$$pid" ] || kill $$pid 2>/dev/null || true; rm -rf "$$dir"' EXIT; \
	for mode in shadow trap mmap; do for spec in "mem:size=1GiB" "file:$$dir/disk,size=1GiB"; do \
		echo "soak: $$mode $$spec"; \
		bin/hostmed serve --socket "$$dir/s" --namespace "$$spec" --doorbells $$mode & pid=$$!; \
		for i in $$(seq 100); do [ -S "$$dir/s" ] && break; kill -0 $$pid; sleep 0.1; done; \
		bin/guestdrv bench "vfio-user:$$dir/s" --rw randrw --bs 512,4k,64k --qd 128 --jobs 4 --runtime $(SOAKTIME) --verify \
			--doorbells $$([ $$mode = shadow ] && echo shadow || echo mmio); \
		kill -TERM $$pid; wait $$pid; pid=; \
	done; done

.PHONY: gen
gen: ## generated code, anew
	$(GO) generate ./...

##@ Set-up
.PHONY: deps
deps: ## what the tests need beside Go: spin and gcc, by apt-get where that is possible
	@missing=(); \
	command -v spin >/dev/null || missing+=(spin); \
	command -v gcc >/dev/null || missing+=(gcc); \
	echo '#include <stdlib.h>' | gcc -E -xc - >/dev/null 2>&1 || missing+=(libc6-dev); \
	[ $${#missing[@]} -eq 0 ] && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "deps: installing $${missing[*]}"; \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get update -qq >/dev/null || echo "deps: apt-get update failed; trying with the lists at hand" >&2; \
		apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null \
			|| echo "deps: apt-get failed; still missing: $${missing[*]}" >&2; \
	else \
		echo "deps: missing, tests that need them are skipped: apt-get install $${missing[*]}" >&2; \
	fi

.PHONY: lab
lab: ## what virtual machines are made of, in a cache directory: QEMU, a kernel, an initramfs; a minute or two, once
	@if [ "$$(uname -m)" = x86_64 ] || [ "$${CI:-}" = true ]; then $(GO) run ./tools/vmlab/cmd setup; \
	else echo "lab: NOT MADE, it needs an x86-64 machine"; fi

.PHONY: clean
clean: ## bin/ and what a broken-off run leaves
	rm -rf bin
	find . -path ./.git -prune -o \( -name '*.test' -o -name '*.prof' -o -name '*.trail' \) -type f -exec rm -f {} +

.PHONY: help
help: ## this list
	@awk 'BEGIN { FS = ":.*## " } /^##@ / { printf "\n%s\n", substr($$0, 5) } /^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
