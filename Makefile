# Berth. `make demo` runs the main job on this machine, `make test` all tests; both need Go and root.
export CGO_ENABLED = 0
VERSION ?= 0.1.0
COMMIT  := $(shell git rev-parse --short HEAD 2>/dev/null)
LDFLAGS := -s -w -X github.com/berth-runtime/berth/internal/version.Version=$(VERSION) -X github.com/berth-runtime/berth/internal/version.Commit=$(COMMIT)
PREFIX  ?= /usr/local
SYSCONF ?= /etc
BIN     ?= bin
BINS    := berthd berth-supervisor berth-oci berth

.PHONY: build test test-vm crash lint bench bench-oci demo install uninstall clean

build:
	@mkdir -p $(BIN)
	go build -trimpath -ldflags '$(LDFLAGS)' -o $(BIN)/ $(addprefix ./cmd/,$(BINS))

test: build
	hack/test.sh

# The same in a virtual machine with cgroup v2 alone, AppArmor and an older kernel; hack/vm.sh knows another one, with systemd.
test-vm:
	hack/vm.sh

# Kills of the daemon and the supervisor at every crash point, and 2,000 pod lives with a kill every 2 s: half an hour.
# `make test` does a sample of the same.
crash: build
	BERTH_CRASH_LONG=1 go test -count=1 -timeout=120m -v ./test/crash

lint:
	hack/lint.sh

bench: build
	hack/bench-compare.sh

# berth-oci beside Debian's runc and crun, command by command.
bench-oci: build
	go build -o bin/bench ./test/bench
	bin/bench oci --hide-unified berth=$(CURDIR)/bin/berth-oci runc=$$(command -v runc) crun=$$(command -v crun)

# make demo KEEP=1 leaves the daemon up and prints how to point crictl or a kubelet at it.
demo: build
	go run ./test/demo $(if $(KEEP),-keep)

# Programs, unit, tmpfiles, completion and, where there is none, the configuration.
# Nothing is started. DESTDIR is put before every path.
COMPLETED := berthd berth-oci berth
share     := $(DESTDIR)$(PREFIX)/share
install: build
	install -D -m 0755 -t $(DESTDIR)$(PREFIX)/bin $(addprefix $(BIN)/,$(BINS))
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system $(DESTDIR)$(SYSCONF)/berth/certs.d
	sed -e '/^# @BINDIR@/d' -e 's,@BINDIR@,$(PREFIX)/bin,' -e 's,@DOCDIR@,$(PREFIX)/share/doc/berth,' hack/packaging/berthd.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/berthd.service
	chmod 0644 $(DESTDIR)$(PREFIX)/lib/systemd/system/berthd.service
	install -D -m 0644 hack/packaging/berth.tmpfiles $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/berth.conf
	install -D -m 0644 -t $(share)/doc/berth docs/install.md
	[ -e $(DESTDIR)$(SYSCONF)/berth/config.toml ] || install -m 0644 hack/packaging/config.toml $(DESTDIR)$(SYSCONF)/berth/config.toml
	install -d $(share)/bash-completion/completions $(share)/zsh/vendor-completions $(share)/fish/vendor_completions.d
	mkdir -p bin/host && env -u GOARCH go build -trimpath -o bin/host/ $(addprefix ./cmd/,$(COMPLETED)) # runs here, also for another architecture
	for c in $(COMPLETED); do \
	  bin/host/$$c completion bash >$(share)/bash-completion/completions/$$c && \
	  bin/host/$$c completion zsh >$(share)/zsh/vendor-completions/_$$c && \
	  bin/host/$$c completion fish >$(share)/fish/vendor_completions.d/$$c.fish || exit 1; done

# The configuration, images and records stay.
uninstall:
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,$(BINS)) $(DESTDIR)$(PREFIX)/lib/systemd/system/berthd.service $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/berth.conf
	rm -f $(addprefix $(share)/bash-completion/completions/,$(COMPLETED)) $(addprefix $(share)/zsh/vendor-completions/_,$(COMPLETED)) $(patsubst %,$(share)/fish/vendor_completions.d/%.fish,$(COMPLETED))
	rm -rf $(share)/doc/berth

clean:
	rm -rf bin
