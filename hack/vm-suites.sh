#!/bin/sh
# In the virtual machine of vm.sh, as root: runs the command in /src/command or
# the suites named in /src/suites, and switches the machine off.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin:/src/bin HOME=/root
export BERTH_TESTIMAGE_PROG=/src/bin/testimage-prog BERTH_TEST_OCI=/src/bin/berth-oci BERTH_TEST_SLOW=5
profile=$(cat /src/profile)
cd /src || exit 1

# named reports whether vm-skips.txt lets a test skip in this profile.
named() {
  awk -v name="$1" -v profile="$profile" '$1 == name { ok = NF == 1; for (i = 2; i <= NF; i++) if ($i == profile) ok = 1; if (ok) found = 1 } END { exit !found }' /src/vm-skips.txt
}

finish() { # says how it went, for vm.sh to read
  echo "vm: end, $1" >/dev/ttyS0 # anew: a command that had it as its terminal took it along
  sync
  poweroff -f
  exit
}

echo # after what the firmware left on the line
echo "vm: Linux $(uname -r), cgroup v2: $(cat /sys/fs/cgroup/cgroup.controllers); LSM: $(cat /sys/kernel/security/lsm)"
if [ -e /src/command ]; then
  setsid -c sh /src/command </dev/ttyS0 >/dev/ttyS0 2>&1 && finish ok
  finish failed
fi
passed=0 failed=0 skipped=0 surprises=0
while read -r suite; do
  cd "/src/$suite" || exit 1
  began=$(cut -d. -f1 /proc/uptime)
  "/src/$suite/suite.test" -test.v -test.timeout=20m -test.run="$(cat /src/run)" >/tmp/log 2>&1 </dev/null
  code=$?
  p=$(grep -c '^ *--- PASS' /tmp/log) f=$(grep -c '^ *--- FAIL' /tmp/log)
  if [ $code != 0 ]; then
    cat /tmp/log
    [ "$f" != 0 ] || f=1 # died, or left something behind
  fi
  for name in $(sed -n 's/^ *--- SKIP: \([^ ]*\).*/\1/p' /tmp/log); do
    skipped=$((skipped + 1))
    named "$suite.$name" && continue
    surprises=$((surprises + 1))
    echo "skipped, and not in vm-skips.txt: $suite.$name: $(grep -B1 -A1 -e "--- SKIP: $name" /tmp/log | grep '\.go:')"
  done
  passed=$((passed + p)) failed=$((failed + f))
  echo "$([ $code = 0 ] && echo ok || echo FAIL) $suite: $p passed, $f failed, $(($(cut -d. -f1 /proc/uptime) - began)) s"
done </src/suites
echo "vm: $profile: $passed passed, $failed failed, $skipped skipped, $(cut -d. -f1 /proc/uptime) s"
[ $failed = 0 ] && [ $surprises = 0 ] && [ $passed != 0 ] && finish ok
finish failed
