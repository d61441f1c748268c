#!/usr/bin/env bash
# All tests: unit, kernel (root), end to end against the real daemon. Ends with a count.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(id -u)" != 0 ]; then
  echo "make test needs root: it makes namespaces, mounts and cgroups of its own (and removes them)" >&2
  exit 1
fi
export CGO_ENABLED=0
go build -o bin/runtests ./hack/runtests
exec bin/runtests -expected-skips hack/expected-skips.txt "${@:-./...}"
