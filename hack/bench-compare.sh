#!/bin/bash
# Measures Berth and containerd + runc in turn, in the same minutes on the same
# machine, and prints a Markdown table of medians and ratios. Everything runs on
# scratch folders and is taken away at the end, also after a failure.
#
#   hack/bench-compare.sh [--only berth|containerd] [--rounds N] [--out DIR] [--install] [-- FLAGS OF test/bench]
#
#   --only     measure this one alone
#   --rounds   how often each is started and measured, in turn (default 3)
#   --out      keep the result of each run (JSON), the logs and the table here
#   --install  get what containerd needs (Debian packages) when it is missing
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; }
die() { echo "bench-compare: $*" >&2; exit 1; }

names=(berth containerd) rounds=3 out='' install=false
while [ $# -gt 0 ]; do
  case $1 in
  --only) [ $# -gt 1 ] || die "--only: want berth or containerd"; names=("$2"); shift 2 ;;
  --rounds) [ $# -gt 1 ] || die "--rounds: want a number"; rounds=$2; shift 2 ;;
  --out) [ $# -gt 1 ] || die "--out: want a folder"; out=$2; shift 2 ;;
  --install) install=true; shift ;;
  -h | --help) usage; exit 0 ;;
  --) shift; break ;;
  *) die "argument $1: see --help" ;;
  esac
done
[[ ${names[0]} =~ ^(berth|containerd)$ ]] || die "--only ${names[0]}: want berth or containerd"
[[ $rounds =~ ^[1-9][0-9]*$ ]] || die "--rounds $rounds: want a number of at least 1"
[ "$(id -u)" = 0 ] || die "runtimes need root"
flags=("$@")

W=$(mktemp -d "${TMPDIR:-/tmp}/bench-compare.XXXXXX")
keep=$out; out=${out:-$W/out}; mkdir -p "$out"; out=$(realpath "$out")
bridge=cmp$$ # at most 15 characters
forward=$(cat /proc/sys/net/ipv4/ip_forward)
# containerd and CNI make these whatever their configuration says; those that are new here go again at the end, when empty.
strays=()
for dir in /run/containerd/s /run/containerd/runc/k8s.io /run/containerd/runc /run/containerd /var/lib/cni/results /var/lib/cni /run/netns; do
  [ -e $dir ] || strays+=("$dir")
done
registry='' reaper='' measuring=''

# stop_runtime ends the runtime that runs, with all that it left: its subreaper sees to that.
stop_runtime() {
  [ -n "$reaper" ] || return 0
  kill -TERM "$reaper" 2>/dev/null || true
  wait "$reaper" || true
  reaper=''
}

clean() {
  local rc=$? m
  trap - EXIT INT TERM
  set +e
  if [ -n "$measuring" ] && kill -TERM "$measuring" 2>/dev/null; then wait "$measuring"; fi
  stop_runtime
  if [ -n "$registry" ]; then kill "$registry" 2>/dev/null; wait "$registry" 2>/dev/null; fi
  tac /proc/self/mountinfo | cut -d' ' -f5 | while read -r m; do
    case $m in "$W"/*) umount -l "$m" ;; esac
  done
  ip link delete "$bridge" 2>/dev/null
  [ "$forward" = "$(cat /proc/sys/net/ipv4/ip_forward)" ] || echo "$forward" >/proc/sys/net/ipv4/ip_forward
  rmdir ${strays[@]+"${strays[@]}"} 2>/dev/null
  if [ $rc != 0 ] && [ $rc -lt 128 ] && [ -z "$keep" ]; then
    for m in "$W"/out/*.log; do [ -s "$m" ] && { echo "== the end of $(basename "$m")" >&2; tail -n 20 "$m" >&2; }; done
  fi
  rm -rf "$W"
  exit $rc
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

have_containerd() { command -v containerd && command -v containerd-shim-runc-v2 && command -v runc && command -v iptables; } >/dev/null
plugins() { local d; for d in /usr/lib/cni /opt/cni/bin; do [ -x "$d/bridge" ] && { echo "$d"; return; }; done; }

install_containerd() {
  local policy=/usr/sbin/policy-rc.d made=false
  if [ ! -e $policy ]; then # the packages would start their services
    printf '#!/bin/sh\nexit 101\n' >$policy; chmod 755 $policy; made=true
  fi
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    containerd runc containernetworking-plugins iptables >"$out/install.log" 2>&1 || { cat "$out/install.log" >&2; $made && rm -f $policy; return 1; }
  if $made; then rm -f $policy; fi
}

build() {
  mkdir -p "$W/bin"
  CGO_ENABLED=0 go build -trimpath -o "$W/bin/bench" ./test/bench
  if [[ " ${names[*]} " == *" berth "* ]]; then
    CGO_ENABLED=0 go build -trimpath -o "$W/bin/" ./cmd/berthd ./cmd/berth-supervisor
  fi
}

start_registry() {
  "$W/bin/bench" registry 127.0.0.1:0 >"$W/pause" 2>"$out/registry.log" &
  registry=$!
  for _ in $(seq 100); do [ -s "$W/pause" ] && return; sleep 0.1; done
  die "registry for the pause image did not start"
}

start_berth() {
  mkdir -p "$W/berth/net.d" "$W/berth/certs.d"; : >"$W/berth/config.toml"
  "$W/bin/bench" reap "$W/bin/berthd" --config "$W/berth/config.toml" --root "$W/berth/root" --state "$W/berth/state" \
    --socket "$W/berth.sock" --cni-conf-dir "$W/berth/net.d" --registry-config-dir "$W/berth/certs.d" >>"$out/berth.log" 2>&1 &
  reaper=$!
}

start_containerd() {
  mkdir -p "$W/containerd/net.d"
  cat >"$W/containerd/net.d/10-bridge.conflist" <<CONF
{"cniVersion": "1.0.0", "name": "bench-compare", "plugins": [
  {"type": "bridge", "bridge": "$bridge", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$W/containerd/ipam", "ranges": [[{"subnet": "10.232.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
CONF
  cat >"$W/containerd/config.toml" <<CONF
version = 2
root = "$W/containerd/root"
state = "$W/containerd/state"
[grpc]
  address = "$W/containerd.sock"
[ttrpc]
  address = "$W/containerd.sock.ttrpc"
[debug]
  level = "warn"
[plugins."io.containerd.internal.v1.opt"]
  path = "$W/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$(cat "$W/pause")"
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$(plugins)"
    conf_dir = "$W/containerd/net.d"
CONF
  "$W/bin/bench" reap containerd --config "$W/containerd/config.toml" >>"$out/containerd.log" 2>&1 &
  reaper=$!
}

# measure NAME ROUND: start it fresh, run the bench on it, end it.
measure() {
  local name=$1 match
  case $name in
  berth) match=berthd,berth-supervisor ;;
  containerd) match=containerd,containerd-shim-runc-v2 ;;
  esac
  echo "bench-compare: $name, round $2 of $rounds" >&2
  "start_$name"
  # In the background, so that a signal to this script is handled at once.
  "$W/bin/bench" --endpoint "$W/$name.sock" --name "$name" --match "$match" --within "$W/" --scratch "$W/scratch" \
    --json "$out/$name-$2.json" ${flags[@]+"${flags[@]}"} >"$out/$name-$2.txt" &
  measuring=$!
  wait "$measuring" || die "$name: round $2 failed"
  measuring=''
  stop_runtime
  # A fresh start is fresh: what the last round left on disk is no part of this one.
  rm -rf "${W:?}/$name" 2>/dev/null || true
}

if [[ " ${names[*]} " == *" containerd "* ]] && ! { have_containerd && [ -n "$(plugins)" ]; }; then
  $install || die "containerd, runc, iptables or the CNI plugins are missing: install them, give --install on Debian, or give --only berth"
  install_containerd
fi
build
mkdir -p "$W/scratch"
start_registry
for round in $(seq "$rounds"); do
  # The one that goes first changes from round to round.
  order=("${names[@]}")
  if [ $((round % 2)) = 0 ] && [ ${#names[@]} = 2 ]; then order=("${names[1]}" "${names[0]}"); fi
  for name in "${order[@]}"; do measure "$name" "$round"; done
done
files=()
for name in "${names[@]}"; do files+=("$out/$name"-*.json); done
"$W/bin/bench" table "${files[@]}" | tee "$out/table.md"
