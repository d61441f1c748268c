package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// killed runs a command and kills it after a while.
func (b *bench) killed(after time.Duration, args ...string) {
	b.t.Helper()
	c := b.command(args...)
	if err := c.Start(); err != nil {
		b.t.Fatal(err)
	}
	time.Sleep(after)
	_ = c.Process.Kill() // it may have ended
	_ = c.Wait()
}

// moments are spread over what a command takes and somewhat more.
func moments(t *testing.T) []time.Duration {
	step := 250 * time.Microsecond
	if testing.Short() {
		step = 2 * time.Millisecond
	}
	var out []time.Duration
	for d := time.Duration(0); d < 16*time.Millisecond; d += step {
		out = append(out, d)
	}
	return out
}

// gone deletes what a killed command left and checks that it is all.
func (b *bench) gone(id string) {
	b.t.Helper()
	if r := b.do("state", id); r.code != 0 {
		r.says("container does not exist")
	} else {
		// The child that the killed one was just making holds the lock for a moment.
		b.eventually("nobody is at work", func() bool { return string(b.state(id).Status) != "creating" })
	}
	if _, err := os.Stat(b.root); err == nil {
		b.do("list").ok()
	}
	b.do("delete", "--force", id).ok()
	b.nothingLeft()
}

func TestKillOfCreateAtAnyMoment(t *testing.T) {
	b := newBench(t, "sleep")
	for _, after := range moments(t) {
		id := b.id()
		b.killed(after, "create", id)
		b.gone(id)
		// The name is free again.
		b.do("create", id).ok()
		b.do("delete", id).ok()
		if t.Failed() {
			t.Fatalf("after %s", after)
		}
	}
}

func TestKillOfRunAtAnyMoment(t *testing.T) {
	b := newBench(t, "sleep")
	for i, after := range moments(t) {
		id := b.id()
		args := []string{"run", id}
		if i%2 == 0 {
			args = []string{"run", "--detach", id}
		}
		b.killed(after, args...)
		b.gone(id)
		if t.Failed() {
			t.Fatalf("after %s", after)
		}
	}
}

func TestKillOfStartAtAnyMoment(t *testing.T) {
	b := newBench(t, "sleep")
	for _, after := range moments(t) {
		id := b.id()
		b.do("create", id).ok()
		b.killed(after, "start", id)
		// Let through the gate by the killed one, it may come to its program only now.
		if r := b.do("start", id); r.code != 0 {
			r.says("already running")
		}
		b.status(id, "running")
		b.gone(id)
		if t.Failed() {
			t.Fatalf("after %s", after)
		}
	}
}

func TestKillOfDeleteAtAnyMoment(t *testing.T) {
	b := newBench(t, "sleep")
	for _, after := range moments(t) {
		id := b.id()
		b.do("run", "-d", id).ok()
		b.killed(after, "delete", "--force", id)
		b.gone(id)
		if t.Failed() {
			t.Fatalf("after %s", after)
		}
	}
}

// A directory that a killed create left before its record is no container, and in nobody's way.
func TestADirectoryWithoutARecord(t *testing.T) {
	b := newBench(t, "true")
	id := b.id()
	left := filepath.Join(b.root, id)
	if err := os.MkdirAll(filepath.Join(left, "gate"), 0o700); err != nil {
		t.Fatal(err)
	}
	b.do("state", id).exits(1).says("container does not exist")
	b.do("list", "-q").ok().prints("")
	b.do("run", id).ok()
	if err := os.MkdirAll(filepath.Join(left, "gate"), 0o700); err != nil {
		t.Fatal(err)
	}
	b.do("delete", "-f", id).ok()
	b.nothingLeft()
}
