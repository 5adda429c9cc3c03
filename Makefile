# Tatami. `make run` shows it at work, `make test` tests it; both install what
# they need on Debian and want root. `make help` lists the rest.

export GOTOOLCHAIN ?= auto
export PATH := $(PATH):/usr/local/go/bin
MODULE := github.com/tatami-containers/tatami
CACHE  ?= $(CURDIR)/.cache
BIN    := $(CURDIR)/bin
LINT   := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

# What `make run` starts: any reference, and the words of its command.
IMAGE ?=
CMD   ?=

GOFLAGS_STATIC := -trimpath -ldflags '-s -w'
PROTOS := cdh/cdh.proto v1/guest.proto v1/runner.proto v1/host.proto
FUZZTIME ?= 10s

.PHONY: help build setup run test check vet lint generate check-generate fuzz bench bench-formats bench-virtiofs bench-scale bench-isolation bench-fleet image-torch nydus virtiofsd clean

help:
	@echo 'make run        a container in a real VM from an image that is not there yet,'
	@echo '                against a full pull in the guest; IMAGE=ref CMD="words" for your own'
	@echo 'make test       all tests: root, FUSE, loop devices, QEMU'
	@echo 'make build      bin/tatami, bin/tatami-host, bin/tatami-guest, bin/tatami-virtiofsd, bin/pause'
	@echo 'make bench      the measurements of README.md'
	@echo 'make bench-formats  those of every image format on an image of 1.8 GB'
	@echo 'make bench-virtiofs  virtio-fs against the relay, full pulls and other devices'
	@echo 'make bench-scale  fifty sandboxes of one image at a time, against one and against full pulls'
	@echo 'make bench-isolation  online and batch on one node, with charts in .cache/isolation'
	@echo 'make bench-fleet  a model of 1,000 to 10,000 nodes, with charts in .cache/fleet'
	@echo 'make check      what needs no privileges: build, vet, lint, generated code'
	@echo 'make fuzz       every fuzz target for FUZZTIME (10s)'

build:
	CGO_ENABLED=0 go build $(GOFLAGS_STATIC) -o $(BIN)/ ./tools/cmd/tatami ./host/cmd/tatami-host ./host/cmd/nydus-overlayfs-tatami ./guest/cmd/tatami-guest ./guest/cmd/pause \
		./virtiofs/cmd/tatami-virtiofsd

setup:
	@tools/setup.sh
	@echo "guest kernel: $$(go run ./tools/vm/cmd/fetch-kernel)"

run: setup build
	@CACHE=$(CACHE) IMAGE='$(IMAGE)' tools/demo/run.sh $(CMD)

test: setup build
	go vet ./...
	go test -race -timeout 40m $(GOTESTFLAGS) ./...

vet:
	go vet ./...

lint:
	go run $(LINT) run --allow-parallel-runners ./...

check: build vet lint check-generate

generate:
	@mkdir -p $(CACHE)/protoc
	go build -o $(CACHE)/protoc/ google.golang.org/protobuf/cmd/protoc-gen-go github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc
	PATH=$(CACHE)/protoc:$$PATH protoc -I protocols/imageservice \
		--go_out=. --go_opt=module=$(MODULE) --go-ttrpc_out=. --go-ttrpc_opt=module=$(MODULE) $(PROTOS)

check-generate: generate
	git diff --exit-code -- '*.pb.go'

fuzz:
	tools/fuzz.sh $(FUZZTIME)

bench: setup build
	@CACHE=$(CACHE) tools/bench.sh

image-torch: setup
	@tools/demo/torch.sh $(CACHE)/torch

bench-formats: setup build
	@CACHE=$(CACHE) tools/bench-formats.sh

# nydus-image for the tests and the benchmark, from its crate; takes a while.
nydus: setup
	@tools/demo/nydus.sh $(CACHE)/nydus

# The virtiofsd that Kata ships, for the same.
virtiofsd: setup
	@tools/demo/virtiofsd.sh $(CACHE)/virtiofsd

bench-virtiofs: setup build
	@CACHE=$(CACHE) tools/bench-virtiofs.sh

bench-scale: setup
	@mkdir -p $(CACHE)
	@go test -run '^$$' -bench Sandboxes -benchtime 1x -timeout 30m ./tests/scale >$(CACHE)/scale.log 2>&1 || { cat $(CACHE)/scale.log; exit 1; }
	@grep '^|' $(CACHE)/scale.log

# EXPERIMENT is a regular expression: E1, Profile, ...
EXPERIMENT ?= .*
bench-isolation: setup
	@mkdir -p $(CACHE)/isolation
	@TATAMI_ISOLATION_OUT=$(CACHE)/isolation go test -run '^$$' -bench 'Isolation/^($(EXPERIMENT))$$' -benchtime 1x -timeout 60m ./tests/isolation \
		>$(CACHE)/isolation/log 2>&1 || { cat $(CACHE)/isolation/log; exit 1; }
	@cat $(CACHE)/isolation/results.md

bench-fleet:
	@mkdir -p $(CACHE)/fleet
	@go run ./tests/bench/fleet -out $(CACHE)/fleet

clean:
	rm -rf $(BIN) $(CACHE)
