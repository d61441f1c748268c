# For vm.sh: what its machines have from Debian, kept in $cache. Sourced.

# fetch_kernel sets $kernel and $release to those of Debian's cloud kernel.
fetch_kernel() {
  local package
  kernel=$cache/kernel
  if ! [ -e "$kernel/complete" ]; then
    depends() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: *\(linux-image-[0-9].*\)/\1/p'; }
    if [ -z "$(depends)" ]; then
      [ "$(id -u)" = 0 ] || die "apt knows no linux-image-cloud-amd64: run apt-get update as root"
      apt-get update -q
    fi
    package=$(depends)
    [ -n "$package" ] || die "apt knows no linux-image-cloud-amd64: want Debian's package lists"
    rm -rf "$kernel"
    mkdir "$kernel"
    (cd "$kernel" && apt-get download -q "$package" && dpkg-deb -x "$package"_*.deb . && rm "$package"_*.deb)
    touch "$kernel/complete"
  fi
  release=$(ls "$kernel/lib/modules")
}

# systemd_root makes the root of a machine with systemd, which runs vm-suites.sh
# as a unit when it is up.
systemd_root() {
  local packages=systemd,systemd-sysv,dbus,apparmor,kmod,iproute2,procps,runc,crun tar
  [ "$(id -u)" = 0 ] || die "profile systemd: needs root, for the owners of files"
  tar=$cache/systemd-$(echo "$packages" | cksum | cut -d' ' -f1).tar
  if ! [ -e "$tar" ]; then
    mmdebstrap --quiet --variant=minbase --include="$packages" "$(. /etc/os-release && echo "$VERSION_CODENAME")" "$W/root.tar"
    mv "$W/root.tar" "$tar.new"
    mv "$tar.new" "$tar"
  fi
  mkdir -p "$root/src"
  tar -C "$root" -xf "$tar" --exclude='./dev/*'
  mkdir -p "$root/src"
  echo "nameserver 192.0.2.1" >"$root/etc/resolv.conf"
  local units=$root/etc/systemd/system
  cat >"$units/suites.service" <<UNIT
[Unit]
Description=test suites
After=multi-user.target

[Service]
Type=oneshot
ExecStart=/bin/sh /src/vm-suites.sh
StandardInput=null
StandardOutput=file:/dev/ttyS0
StandardError=file:/dev/ttyS0
Delegate=yes
TasksMax=infinity
LimitNOFILE=1048576
UNIT
  mkdir -p "$units/graphical.target.wants"
  ln -s ../suites.service "$units/graphical.target.wants/suites.service"
  local off
  for off in serial-getty@ttyS0.service getty@tty1.service apt-daily.timer apt-daily-upgrade.timer; do ln -s /dev/null "$units/$off"; done
}
