package seccomp

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// choice is one rule for a system call: an action if all conditions hold.
type choice struct {
	conds []specs.LinuxSeccompArg
	ret   uint32
}

// rule is a choice for the call of a name.
type rule struct {
	name string
	choice
}

var operators = []specs.LinuxSeccompOperator{
	specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual,
	specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpMaskedEqual,
}

// gather lists the profile's rules in its order, one for each name.
func gather(p *specs.LinuxSeccomp) ([]rule, error) {
	var rules []rule
	for i, s := range p.Syscalls {
		field := fmt.Sprintf("linux.seccomp.syscalls[%d]", i)
		act, err := action(s.Action, s.ErrnoRet, field+".action", field+".errnoRet")
		if err != nil {
			return nil, err
		}
		if len(s.Names) == 0 || slices.Contains(s.Names, "") {
			return nil, fmt.Errorf("%s.names: empty, or has an empty name: %w", field, errdefs.ErrInvalidArgument)
		}
		seen := map[uint]bool{}
		repeated := false
		for k, a := range s.Args {
			if a.Index > 5 {
				return nil, fmt.Errorf("%s.args[%d].index %d: want 0 to 5: %w", field, k, a.Index, errdefs.ErrInvalidArgument)
			}
			if !slices.Contains(operators, a.Op) {
				return nil, fmt.Errorf("%s.args[%d].op %q: unknown: %w", field, k, a.Op, errdefs.ErrInvalidArgument)
			}
			repeated = repeated || seen[a.Index]
			seen[a.Index] = true
		}
		choices := []choice{{s.Args, act}}
		if repeated {
			// Conditions on one argument twice are alternatives, by the convention of
			// every OCI runtime (one rule each).
			choices = nil
			for _, a := range s.Args {
				choices = append(choices, choice{[]specs.LinuxSeccompArg{a}, act})
			}
		}
		for _, n := range s.Names {
			for _, c := range choices {
				rules = append(rules, rule{n, c})
			}
		}
	}
	return rules, nil
}

// unconditional is what a call gets when no condition holds. A rule that repeats
// the default action does not hide a later one, as in every OCI runtime.
func unconditional(cs []choice, def uint32) uint32 {
	for _, c := range cs {
		if len(c.conds) == 0 && c.ret != def {
			return c.ret
		}
	}
	return def
}

// passes tells the actions that let a call through from those that stop it.
func passes(ret uint32) bool {
	return ret == unix.SECCOMP_RET_ALLOW || ret == unix.SECCOMP_RET_LOG
}

// outcomes groups the rules by the numbers that their names have here, and
// returns the highest number the profile names, if any.
func (a *arch) outcomes(rules []rule, calls map[string]uint32, def uint32) (out map[uint32][]choice, last uint32, named bool) {
	out = map[uint32][]choice{}
	muxed := map[string][]choice{}
	var order []string
	for _, r := range rules {
		if nr, ok := calls[r.name]; ok {
			out[nr] = append(out[nr], r.choice)
			last, named = max(last, nr), true
		}
		if _, ok := a.muxed[r.name]; ok {
			if _, ok := muxed[r.name]; !ok {
				order = append(order, r.name)
			}
			muxed[r.name] = append(muxed[r.name], r.choice)
		}
	}
	for _, name := range order {
		m := a.muxed[name]
		nr := calls[m.call]
		out[nr] = append(out[nr], m.translate(muxed[name], def)...)
		last, named = max(last, nr), true
	}
	return out, last, named
}

// mux is a call that i386 has a second time, as a function of another call.
type mux struct {
	call     string // "socketcall" or "ipc"
	function uint64
	mask     uint64 // of the first argument
}

// translate says what the rules of a call mean for its function of the other
// call. Its arguments are in memory there, out of a filter's sight: a rule with
// conditions that stops the call stops the function whatever its arguments, one
// that lets it pass is left out.
func (m mux) translate(cs []choice, def uint32) []choice {
	here := []specs.LinuxSeccompArg{{Index: 0, Value: m.mask, ValueTwo: m.function, Op: specs.OpMaskedEqual}}
	for _, c := range cs {
		if len(c.conds) > 0 && !passes(c.ret) {
			return []choice{{here, c.ret}}
		}
	}
	for _, c := range cs {
		if len(c.conds) == 0 {
			return []choice{{here, unconditional(cs, def)}}
		}
	}
	return nil
}
