#!/bin/busybox sh
# The first process of the virtual machine of vm.sh: makes the machine a node,
# runs the suites named in /src/suites and switches the machine off.
export PATH=/bin:/sbin:/usr/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t securityfs security /sys/kernel/security
mount -t cgroup2 cgroup /sys/fs/cgroup
mkdir -p /dev/pts /dev/shm
mount -t devpts -o ptmxmode=666 devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/lock
hostname node
ip link set lo up
# As a service manager does: no process in the root cgroup, controllers on.
mkdir /sys/fs/cgroup/init
echo $$ >/sys/fs/cgroup/init/cgroup.procs
echo "+cpuset +cpu +io +memory +hugetlb +pids" >/sys/fs/cgroup/cgroup.subtree_control

echo # after what the firmware left on the line
echo "vm: Linux $(uname -r), cgroup v2: $(cat /sys/fs/cgroup/cgroup.controllers); LSM: $(cat /sys/kernel/security/lsm)"
export BERTH_TESTIMAGE_PROG=/src/bin/testimage-prog BERTH_TEST_SLOW=5
passed=0 failed=0 skipped=0 surprises=0
while read -r suite; do
  cd /src/$suite || exit 1
  began=$(cut -d. -f1 /proc/uptime)
  /src/$suite/suite.test -test.v -test.timeout=20m -test.run="$(cat /src/run)" >/tmp/log 2>&1 </dev/null
  code=$?
  p=$(grep -c '^ *--- PASS' /tmp/log) f=$(grep -c '^ *--- FAIL' /tmp/log)
  if [ $code != 0 ]; then
    cat /tmp/log
    [ $f != 0 ] || f=1 # died, or left something behind
  fi
  for name in $(sed -n 's/^ *--- SKIP: \([^ ]*\).*/\1/p' /tmp/log); do
    skipped=$((skipped + 1))
    grep -q "^$suite\.$name\$" /src/vm-skips.txt && continue
    surprises=$((surprises + 1))
    echo "skipped, and not in vm-skips.txt: $suite.$name: $(grep -B1 -A1 -e "--- SKIP: $name" /tmp/log | grep '\.go:')"
  done
  passed=$((passed + p)) failed=$((failed + f))
  echo "$([ $code = 0 ] && echo ok || echo FAIL) $suite: $p passed, $f failed, $(($(cut -d. -f1 /proc/uptime) - began)) s"
done </src/suites
echo "$passed passed, $failed failed, $skipped skipped, $(cut -d. -f1 /proc/uptime) s"
[ $failed = 0 ] && [ $surprises = 0 ] && [ $passed != 0 ] && echo "vm: end, ok" || echo "vm: end, failed"
sync
poweroff -f
