#!/usr/bin/env bash
# Runs test suites as root in a virtual machine with what production nodes have
# and a developer's machine may not: cgroup v2 alone, AppArmor, Linux 6.1
# (Debian's cloud kernel). Ends with a count; fails when a test fails or skips
# without being named in vm-skips.txt.
#
#   hack/vm.sh [--timeout SECONDS] [--run REGEXP] [PACKAGE...]
#
#   --timeout  for the whole machine (default 1800)
#   --run      only tests that match, as `go test -run`
#   PACKAGE    such as ./sandbox/stats (default: every package that has tests)
#
# It needs Linux on amd64, Go, and Debian's packages of qemu, busybox, e2fsprogs,
# kmod, runc and crun, which apt-get installs when they are missing (then it needs root).
# The kernel is downloaded once, to ${XDG_CACHE_HOME:-~/.cache}/berth/vm.
# BERTH_VM_ACCEL=kvm uses the processor's virtualization; the default, tcg, is
# slower and runs everywhere.
set -euo pipefail
cd "$(dirname "$0")/.."
export CGO_ENABLED=0

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; }
die() { echo "vm: $*" >&2; exit 1; }

timeout=1800 run='' pkgs=()
while [ $# -gt 0 ]; do
  case $1 in
  --timeout) [ $# -gt 1 ] || die "--timeout: want seconds"; timeout=$2; shift 2 ;;
  --run) [ $# -gt 1 ] || die "--run: want a regular expression"; run=$2; shift 2 ;;
  -h | --help) usage; exit 0 ;;
  -*) die "argument $1: see --help" ;;
  *) pkgs+=("$1"); shift ;;
  esac
done
[ "$(uname -m)" = x86_64 ] || die "needs an amd64 machine: its kernel and emulator are for that"
PATH=$PATH:/usr/sbin:/sbin

missing=()
for need in qemu-system-x86_64:qemu-system-x86 busybox:busybox-static mke2fs:e2fsprogs depmod:kmod cpio:cpio dpkg-deb:dpkg runc:runc crun:crun; do
  command -v "${need%%:*}" >/dev/null || missing+=("${need##*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
  [ "$(id -u)" = 0 ] || die "missing: ${missing[*]}: install them, or run as root"
  apt-get update -q
  apt-get install -q -y --no-install-recommends "${missing[@]}"
fi

cache=${XDG_CACHE_HOME:-$HOME/.cache}/berth/vm
mkdir -p "$cache"
if ! [ -e "$cache/kernel/complete" ]; then
  depends() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: *\(linux-image-[0-9].*\)/\1/p'; }
  if [ -z "$(depends)" ]; then
    [ "$(id -u)" = 0 ] || die "apt knows no linux-image-cloud-amd64: run apt-get update as root"
    apt-get update -q
  fi
  package=$(depends)
  [ -n "$package" ] || die "apt knows no linux-image-cloud-amd64: want Debian's package lists"
  rm -rf "$cache/kernel"
  mkdir "$cache/kernel"
  (cd "$cache/kernel" && apt-get download -q "$package" && dpkg-deb -x "$package"_*.deb . && rm "$package"_*.deb)
  touch "$cache/kernel/complete"
fi
release=$(ls "$cache/kernel/lib/modules")

W=$(mktemp -d "${TMPDIR:-/tmp}/berth-vm.XXXXXX")
trap 'rm -rf "$W"' EXIT

# The root filesystem: busybox, the modules that nodes load, and below /src the
# compiled suites in the places where their packages have them.
root=$W/root
mkdir -p "$root"/{bin,sbin,usr/bin,dev,proc,sys,run,tmp,etc,root,src/bin,var/lib}
echo "nameserver 192.0.2.1" >"$root/etc/resolv.conf" # pods without a DNS config get the node's
cp "$(command -v busybox)" "$root/bin/busybox"
for name in $(busybox --list); do [ "$name" = busybox ] || ln -s busybox "$root/bin/$name"; done
ln -s ../bin/busybox "$root/sbin/modprobe" # where the kernel looks for it
cp hack/vm-guest.sh "$root/sbin/init"
# External runtimes, where their packages have them, with the libraries that they link.
for name in sbin/runc bin/crun; do
  install -D "/usr/$name" "$root/usr/$name"
  ldd "/usr/$name" | grep -o '/[^ ]*' | while read -r lib; do [ "$lib" = "/usr/$name:" ] || install -D "$lib" "$root$lib"; done
done
modules=lib/modules/$release
mkdir -p "$root/$modules/kernel"/{fs,net/ipv4,drivers/net,drivers/block}
for m in arch crypto lib net/netfilter net/ipv4/netfilter net/ipv6 net/sched net/bridge net/802 net/llc fs/overlayfs drivers/net/veth.ko drivers/net/dummy.ko drivers/virtio drivers/block/virtio_blk.ko; do
  cp -a "$cache/kernel/$modules/kernel/$m" "$root/$modules/kernel/$m"
done
cp "$cache/kernel/$modules"/modules.{order,builtin,builtin.modinfo} "$root/$modules/"
depmod -b "$root" "$release"

cp go.mod "$root/src/"
go build -trimpath -ldflags '-s -w' -o "$root/src/bin/" ./cmd/...
(cd test/testimage/prog && go build -trimpath -ldflags '-s -w' -o "$root/src/bin/testimage-prog" .)
# All but internal/layering, which asks the go command about the source.
[ ${#pkgs[@]} -gt 0 ] || mapfile -t pkgs < <(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' ./... | sed 's,^[^/]*/[^/]*/[^/]*,.,' | grep -v '^./internal/layering$')
for p in "${pkgs[@]}"; do
  p=${p#./}
  mkdir -p "$root/src/$p"
  go test -c -trimpath -ldflags '-s -w' -o "$root/src/$p/suite.test" "./$p"
  if [ -d "$p/testdata" ]; then cp -a "$p/testdata" "$root/src/$p/"; fi
  echo "$p" >>"$root/src/suites"
done
cp hack/vm-skips.txt "$root/src/"
printf '%s' "$run" >"$root/src/run"

truncate -s 4G "$W/disk"
mke2fs -q -F -t ext4 -d "$root" "$W/disk"
initrd=$W/initrd
disk=(virtio/{virtio_ring,virtio,virtio_pci_legacy_dev,virtio_pci_modern_dev,virtio_pci} block/virtio_blk) # in the order they need each other
mkdir -p "$initrd"/{bin,dev,proc,newroot}
cp "$root/bin/busybox" "$initrd/bin/"
for m in "${disk[@]}"; do cp "$root/$modules/kernel/drivers/$m.ko" "$initrd/"; done
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

timeout "$timeout" qemu-system-x86_64 -accel "${BERTH_VM_ACCEL:-tcg}" -cpu max -m 3072 -smp 2 -nographic -no-reboot \
  -kernel "$cache"/kernel/boot/vmlinuz-* -initrd "$W/initrd.gz" -drive "file=$W/disk,format=raw,if=virtio,cache=unsafe" \
  -append "console=ttyS0 quiet panic=-1 cgroup_no_v1=all apparmor=1 security=apparmor" </dev/null 2>&1 |
  sed -u 's/\r//g' | tee "$W/console" | sed -un '/^vm: Linux/,$p' || true
grep -q '^vm: Linux' "$W/console" || cat "$W/console" >&2
grep -q '^vm: end' "$W/console" || die "not at its end after $timeout s, or the machine crashed"
grep -q '^vm: end, ok$' "$W/console" || die "failed"
