# vigia. The two that set everything up by themselves are `make demo` and `make test`.

GO      ?= go
VERSION ?= $(shell git describe --always --dirty 2>/dev/null || echo dev)

.PHONY: build plugin demo test bench lint fuzz soak generate setup clean

build: plugin
	GO='$(GO)' script/build '$(VERSION)'

# The plugin for QEMU, once for each of its plugin APIs. Optional: without a C compiler processes are sampled.
plugin:
	script/plugin

setup:
	script/setup

demo: setup build
	$(GO) run ./demo

test: setup build
	script/test

bench: setup build
	script/bench

lint:
	$(GO) vet ./...
	test -z "$$(gofmt -l .)"

fuzz:
	script/fuzz

soak: setup build
	script/soak

generate:
	script/generate

clean:
	rm -rf bin .cache
