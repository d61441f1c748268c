#!/usr/bin/env bash
# gofmt, vet and staticcheck on both architectures. staticcheck's version is pinned in hack/tools/go.mod.
set -euo pipefail
cd "$(dirname "$0")/.."
export CGO_ENABLED=0
unformatted=$(gofmt -l cmd cri sandbox imageservice cni oci internal hack test)
if [ -n "$unformatted" ]; then
  echo "gofmt would change:"; echo "$unformatted"; exit 1
fi
go vet ./...
GOARCH=arm64 go vet ./...
go build -modfile=hack/tools/go.mod -o bin/staticcheck honnef.co/go/tools/cmd/staticcheck
bin/staticcheck ./...
echo "lint: clean"
