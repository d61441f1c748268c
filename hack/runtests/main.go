// Command runtests runs the tests of the packages given to it, one package at a
// time (they share one kernel: cgroups, mounts, tables), names what failed and
// what was skipped and why, compares the skips with the expected list, looks
// for things left behind, and ends with a count.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"sort"
	"strings"
	"time"

	"github.com/berth-runtime/berth/test/leak"
)

type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

type result struct {
	passed, failed int
	skips          map[string]string // package.Test -> reason
	output         map[string][]string
}

func main() {
	expected := flag.String("expected-skips", "", "file of skips that are no surprise, one package.Test a line; # comments")
	timeout := flag.Duration("timeout", 20*time.Minute, "for each package")
	flag.Parse()
	before, err := leak.Take()
	if err != nil {
		fatal(err)
	}
	r, runErr := run(*timeout, flag.Args())
	for name, why := range r.skips {
		fmt.Printf("SKIP %s: %s\n", name, why)
	}
	bad := runErr != nil || r.failed > 0
	if surprise := unexpected(*expected, r.skips); len(surprise) > 0 {
		bad = true
		fmt.Printf("skipped, and not in %s: %s\n", *expected, strings.Join(surprise, ", "))
	}
	left, err := before.Since(15 * time.Second)
	if err != nil {
		fatal(err)
	}
	for _, l := range left {
		bad = true
		fmt.Printf("LEFT BEHIND %s\n", l)
	}
	if runErr != nil {
		fmt.Printf("go test: %v\n", runErr)
	}
	if bad && r.failed == 0 {
		r.failed = 1 // a leak, a surprise skip or a package that does not build fails the run
	}
	fmt.Printf("%d passed, %d failed, %d skipped\n", r.passed, r.failed, len(r.skips))
	if bad {
		os.Exit(1)
	}
}

func run(timeout time.Duration, pkgs []string) (*result, error) {
	r := &result{skips: map[string]string{}, output: map[string][]string{}}
	args := append([]string{"test", "-json", "-count=1", "-p=1", "-timeout=" + timeout.String()}, pkgs...)
	cmd := exec.Command("go", args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return r, err
	}
	if err := cmd.Start(); err != nil {
		return r, err
	}
	in := bufio.NewScanner(out)
	in.Buffer(nil, 16<<20)
	for in.Scan() {
		var e event
		if json.Unmarshal(in.Bytes(), &e) != nil {
			fmt.Println(in.Text())
			continue
		}
		r.add(e)
	}
	return r, cmd.Wait()
}

func (r *result) add(e event) {
	key := e.Package + "." + e.Test
	switch e.Action {
	case "output", "build-output":
		r.output[key] = append(r.output[key], e.Output)
		if e.Action == "build-output" {
			fmt.Print(e.Output)
		}
		return
	case "pass", "fail", "skip":
	default:
		return
	}
	if e.Test == "" {
		fmt.Printf("%-4s %s %.1fs\n", e.Action, e.Package, e.Elapsed)
		if e.Action == "fail" {
			fmt.Print(strings.Join(r.output[key], ""))
		}
		return
	}
	switch e.Action {
	case "pass":
		r.passed++
	case "fail":
		r.failed++
		fmt.Printf("FAIL %s\n%s", key, strings.Join(r.output[key], ""))
	case "skip":
		r.skips[key] = reason(r.output[key])
	}
	delete(r.output, key)
}

// reason is the text of t.Skip: the indented line "    file.go:12: text".
func reason(lines []string) string {
	for _, l := range lines {
		if t := strings.TrimSpace(l); strings.Contains(t, ".go:") && !strings.HasPrefix(t, "---") {
			if _, after, ok := strings.Cut(t, ": "); ok {
				return after
			}
		}
	}
	return "no reason given"
}

func unexpected(file string, skips map[string]string) []string {
	known := map[string]bool{}
	if file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
				known[line] = true
			}
		}
	}
	var out []string
	for name := range skips {
		if !known[strings.TrimPrefix(name, "github.com/berth-runtime/berth/")] {
			out = append(out, name)
		}
	}
	sort.Strings(out)
	return out
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "runtests:", err)
	os.Exit(2)
}
