package embedded

import (
	"path"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func checkProcess(p *specs.Process, args bool) error {
	switch {
	case args && (len(p.Args) == 0 || p.Args[0] == ""):
		return invalid("process.args: empty")
	case args && !path.IsAbs(p.Cwd):
		return invalid("process.cwd %q: want an absolute path", p.Cwd)
	case p.User.UID == ^uint32(0) || p.User.GID == ^uint32(0):
		return invalid("process.user: 4294967295 is no id")
	case p.User.Umask != nil && *p.User.Umask > 0o777:
		return invalid("process.user.umask %#o: want at most 0777", *p.User.Umask)
	case p.OOMScoreAdj != nil && (*p.OOMScoreAdj < -1000 || *p.OOMScoreAdj > 1000):
		return invalid("process.oomScoreAdj %d: want -1000 to 1000", *p.OOMScoreAdj)
	}
	if p.Scheduler != nil {
		if _, err := schedAttr(p.Scheduler); err != nil {
			return err
		}
	}
	if p.IOPriority != nil {
		if _, err := ioPriority(p.IOPriority); err != nil {
			return err
		}
	}
	if a := p.ExecCPUAffinity; a != nil {
		for _, x := range [][2]string{{"initial", a.Initial}, {"final", a.Final}} {
			if x[1] == "" {
				continue
			}
			if _, err := cpuMask("process.execCPUAffinity."+x[0], x[1]); err != nil {
				return err
			}
		}
	}
	for _, list := range [][]string{p.Args, p.Env, {p.Cwd, p.ApparmorProfile, p.SelinuxLabel}} {
		for _, v := range list {
			if strings.ContainsRune(v, 0) {
				return invalid("process: a string holds a NUL byte: %q", v)
			}
		}
	}
	for i, l := range p.Rlimits {
		if _, ok := rlimits[l.Type]; !ok {
			return invalid("process.rlimits[%d].type %q: unknown", i, l.Type)
		}
		if l.Soft > l.Hard {
			return invalid("process.rlimits[%d]: soft %d is above hard %d", i, l.Soft, l.Hard)
		}
	}
	return nil
}

var rlimits = map[string]int{
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_CPU": unix.RLIMIT_CPU,
	"RLIMIT_DATA": unix.RLIMIT_DATA, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS,
	"RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK, "RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE,
	"RLIMIT_NOFILE": unix.RLIMIT_NOFILE, "RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_RSS": unix.RLIMIT_RSS,
	"RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO, "RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
	"RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_STACK": unix.RLIMIT_STACK,
}
