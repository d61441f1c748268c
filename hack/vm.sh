#!/usr/bin/env bash
# Runs test suites as root in virtual machines with what production nodes have
# and a developer's machine may not. Each ends with a count, and fails when a
# test fails or skips without being named in vm-skips.txt.
#
#   hack/vm.sh [--profile NAME]... [--timeout SECONDS] [--run REGEXP] [PACKAGE...]
#   hack/vm.sh [--profile NAME] [--timeout SECONDS] run -- COMMAND [ARGUMENT...]
#
#   --profile  plain:      cgroup v2 alone, AppArmor, Linux 6.1 (Debian's cloud kernel)
#              systemd:    the same with systemd as pid 1, D-Bus and apparmor_parser
#              (default: plain)
#   --timeout  for each machine (default 1800)
#   --run      only tests that match, as `go test -run`
#   PACKAGE    such as ./sandbox/stats (default: every package that has tests; in
#              systemd those that are about it)
#   run        runs a command instead, with Berth's programs in PATH; on a terminal
#              it can be a shell (end qemu with ctrl-a x)
#
# It needs Linux on amd64, Go, and Debian's packages of qemu, busybox, e2fsprogs,
# kmod, runc, crun and, as root, mmdebstrap, which apt-get installs when they are
# missing (then it needs root). Kernels and the systemd root are kept in
# ${XDG_CACHE_HOME:-~/.cache}/berth/vm, and what each machine said in its results.
# BERTH_VM_ACCEL=kvm uses the processor's virtualization; the default, tcg, is
# slower and runs everywhere.
set -euo pipefail
cd "$(dirname "$0")/.."
export CGO_ENABLED=0

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; }
die() { echo "vm: $*" >&2; exit 1; }

timeout=1800 run='' profiles=() pkgs=() command=()
while [ $# -gt 0 ]; do
  case $1 in
  --profile)
    case ${2-} in plain | systemd) profiles+=("$2") ;; *) die "--profile: want plain or systemd" ;; esac
    shift 2 ;;
  --timeout) [ $# -gt 1 ] || die "--timeout: want seconds"; timeout=$2; shift 2 ;;
  --run) [ $# -gt 1 ] || die "--run: want a regular expression"; run=$2; shift 2 ;;
  -h | --help) usage; exit 0 ;;
  -*) die "argument $1: see --help" ;;
  run) [ "${2-}" = -- ] && [ $# -gt 2 ] || die "run: want -- COMMAND"; shift 2; command=("$@"); break ;;
  *) pkgs+=("$1"); shift ;;
  esac
done
if [ ${#profiles[@]} = 0 ]; then
  profiles=(plain)
fi
[ ${#command[@]} = 0 ] || [ ${#profiles[@]} = 1 ] || die "run: want one --profile"
[ "$(uname -m)" = x86_64 ] || die "needs an amd64 machine: its kernel and emulator are for that"
PATH=$PATH:/usr/sbin:/sbin

missing=()
for need in qemu-system-x86_64:qemu-system-x86 busybox:busybox-static mke2fs:e2fsprogs depmod:kmod cpio:cpio dpkg-deb:dpkg runc:runc crun:crun; do
  command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
done
[[ " ${profiles[*]} " != *" systemd "* ]] || command -v mmdebstrap >/dev/null || missing+=(mmdebstrap)
if [ ${#missing[@]} -gt 0 ]; then
  [ "$(id -u)" = 0 ] || die "missing: ${missing[*]}: install them, or run as root"
  apt-get update -q
  apt-get install -q -y --no-install-recommends "${missing[@]}"
fi

cache=${XDG_CACHE_HOME:-$HOME/.cache}/berth/vm
mkdir -p "$cache/results"
W=$(mktemp -d "${TMPDIR:-/tmp}/berth-vm.XXXXXX")
trap 'rm -rf "$W"' EXIT
. hack/vm-debian.sh

# What is compiled once for all machines.
mkdir -p "$W/bin" "$W/suites"
go build -trimpath -ldflags '-s -w' -o "$W/bin/" ./cmd/...
(cd test/testimage/prog && go build -trimpath -ldflags '-s -w' -o "$W/bin/testimage-prog" .)
# All but internal/layering, which asks the go command about the source.
mapfile -t all < <(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' ./... | sed 's,^[^/]*/[^/]*/[^/]*,.,' | grep -v '^./internal/layering$')

# suites are the packages that a profile tests.
suites() {
  if [ ${#pkgs[@]} -gt 0 ]; then
    printf '%s\n' "${pkgs[@]}"
  else
    case $1 in
    plain) printf '%s\n' "${all[@]}" ;;
    systemd) printf '%s\n' ./oci/embedded/cgroup/systemd ./cmd/berth-oci ./sandbox/stats ./test/conformance ;;
    esac
  fi
}

# compile makes a package's suite, once.
compile() {
  [ -e "$W/suites/$1/suite.test" ] && return
  mkdir -p "$W/suites/$1"
  go test -c -trimpath -ldflags '-s -w' -o "$W/suites/$1/suite.test" "./$1"
  [ ! -d "$1/testdata" ] || cp -a "$1/testdata" "$W/suites/$1/"
}

# busybox_root makes the root of a machine without a service manager.
busybox_root() {
  local name lib
  mkdir -p "$root"/{bin,sbin,usr/bin,dev,proc,sys,run,tmp,etc,root,src,var/lib}
  echo "nameserver 192.0.2.1" >"$root/etc/resolv.conf" # pods without a DNS config get the node's
  echo "root:x:0:0:root:/root:/bin/sh" >"$root/etc/passwd"
  echo "root:x:0:" >"$root/etc/group"
  cp "$(command -v busybox)" "$root/bin/busybox"
  for name in $(busybox --list); do [ "$name" = busybox ] || ln -s busybox "$root/bin/$name"; done
  ln -s ../bin/busybox "$root/sbin/modprobe" # where the kernel looks for it
  cp hack/vm-guest.sh "$root/sbin/init"
  # External runtimes, where their packages have them, with the libraries that they link.
  for name in sbin/runc bin/crun; do
    install -D "/usr/$name" "$root/usr/$name"
    ldd "/usr/$name" | grep -o '/[^ ]*' | while read -r lib; do [ "$lib" = "/usr/$name:" ] || install -D "$lib" "$root$lib"; done
  done
}

# modules puts the kernel modules that nodes load into the root.
modules() {
  local m dir=lib/modules/$release
  mkdir -p "$root/$dir/kernel"/{fs,net/ipv4,drivers/net,drivers/block}
  for m in arch crypto lib net/netfilter net/ipv4/netfilter net/ipv6 net/sched net/bridge net/802 net/llc fs/overlayfs drivers/net/veth.ko drivers/net/dummy.ko drivers/virtio drivers/block/virtio_blk.ko; do
    [ ! -e "$kernel/$dir/kernel/$m" ] || cp -a "$kernel/$dir/kernel/$m" "$root/$dir/kernel/$m"
    [ ! -e "$kernel/$dir/kernel/$m.xz" ] || cp -a "$kernel/$dir/kernel/$m.xz" "$root/$dir/kernel/$m.xz"
  done
  find "$root/$dir" -name '*.xz' -exec xz -d {} + # busybox and the first insmod want them plain
  cp "$kernel/$dir"/modules.{order,builtin,builtin.modinfo} "$root/$dir/"
  depmod -b "$root" "$release"
}

# boot runs the machine of a profile; its console goes to $console.
boot() {
  profile=$1 root=$W/root console=$cache/results/$1.log
  local p m initrd=$W/initrd how=() disk
  rm -rf "$root" "$W/disk" "$initrd"
  fetch_kernel
  case $profile in systemd) systemd_root ;; *) busybox_root ;; esac
  modules
  cp -a "$W/bin" go.mod hack/vm-skips.txt hack/vm-suites.sh "$root/src/"
  echo "$profile" >"$root/src/profile"
  printf '%s' "$run" >"$root/src/run"
  if [ ${#command[@]} -gt 0 ]; then
    echo "${command[*]@Q}" >"$root/src/command"
  else
    for p in $(suites "$profile"); do
      p=${p#./}
      compile "$p"
      mkdir -p "$root/src/$p"
      cp -a "$W/suites/$p/." "$root/src/$p/"
      echo "$p" >>"$root/src/suites"
    done
  fi
  truncate -s 4G "$W/disk"
  mke2fs -q -F -t ext4 -d "$root" "$W/disk"
  disk=(virtio/{virtio_ring,virtio,virtio_pci_legacy_dev,virtio_pci_modern_dev,virtio_pci} block/virtio_blk) # in the order they need each other
  mkdir -p "$initrd"/{bin,dev,proc,newroot}
  cp "$(command -v busybox)" "$initrd/bin/"
  for m in "${disk[@]}"; do cp "$root/lib/modules/$release/kernel/drivers/$m.ko" "$initrd/"; done
  cat >"$initrd/init" <<INIT
#!/bin/busybox sh
for m in ${disk[@]##*/}; do /bin/busybox insmod /\$m.ko; done
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t ext4 /dev/vda /newroot
/bin/busybox mount --move /dev /newroot/dev
exec /bin/busybox switch_root /newroot /sbin/init
INIT
  chmod +x "$initrd/init"
  (cd "$initrd" && find . | cpio -o -H newc --quiet | gzip -1) >"$W/initrd.gz"

  how=(timeout --foreground "$timeout" qemu-system-x86_64 -accel "${BERTH_VM_ACCEL:-tcg}" -cpu max -m 3072 -smp 2 -nographic -no-reboot
    -kernel "$kernel"/boot/vmlinuz-* -initrd "$W/initrd.gz" -drive "file=$W/disk,format=raw,if=virtio,cache=unsafe"
    -append "console=ttyS0 quiet panic=-1 cgroup_no_v1=all apparmor=1 security=apparmor systemd.show_status=0")
  if [ ${#command[@]} -gt 0 ] && [ -t 0 ]; then
    "${how[@]}" | tee "$console" || true
  else
    "${how[@]}" </dev/null 2>&1 | sed -u 's/\r//g' | tee "$console" | sed -un '/^vm: Linux/,$p' || true
  fi
  grep -aq '^vm: Linux' "$console" || cat "$console" >&2
  grep -aq '^vm: end' "$console" || { echo "vm: $profile: not at its end after $timeout s, or the machine crashed" >&2; return 1; }
  grep -aq $'^vm: end, ok\r\\?$' "$console"
}

failed=()
for p in "${profiles[@]}"; do boot "$p" || failed+=("$p"); done
[ ${#command[@]} = 0 ] || [ ${#failed[@]} = 0 ] || die "$p: the command failed"
for p in "${profiles[@]}"; do grep -a "^vm: $p:" "$cache/results/$p.log" || true; done
[ ${#failed[@]} = 0 ] || die "failed: ${failed[*]}"
