# Berth. `make demo` runs the main job on this machine, `make test` all tests; both need Go and root.
export CGO_ENABLED = 0
VERSION ?= 0.1.0
COMMIT  := $(shell git rev-parse --short HEAD 2>/dev/null)
LDFLAGS := -s -w -X github.com/berth-runtime/berth/internal/version.Commit=$(COMMIT)
PREFIX  ?= /usr/local
BINS    := berthd berth-supervisor berth-oci berth

.PHONY: build test test-vm lint bench demo install uninstall clean

build:
	@mkdir -p bin
	go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ $(addprefix ./cmd/,$(BINS))

test: build
	hack/test.sh

# The same in virtual machines: cgroup v2 alone with AppArmor, systemd, restrictions, another kernel (see hack/vm.sh).
test-vm:
	hack/vm.sh

lint:
	hack/lint.sh

bench: build
	hack/bench-compare.sh

# make demo KEEP=1 leaves the daemon up and prints how to point crictl or a kubelet at it.
demo: build
	go run ./test/demo $(if $(KEEP),-keep)

install: build
	install -D -m 0755 -t $(DESTDIR)$(PREFIX)/bin $(addprefix bin/,$(BINS))

uninstall:
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,$(BINS))

clean:
	rm -rf bin
