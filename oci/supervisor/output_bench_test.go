package supervisor

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berth-runtime/berth/oci/supervisor/crilog"
	"github.com/berth-runtime/berth/oci/supervisor/lane"
)

// BenchmarkOutput is the way from a container's pipe to its log file. CPU is that
// of the whole process: writer and reader.
func BenchmarkOutput(b *testing.B) {
	line := []byte(strings.Repeat("x", 99) + "\n")
	for _, c := range []struct {
		name  string
		write []byte
		alone bool // each write waits until the former is in the log
	}{
		{"bulk", bytes.Repeat(line, 655), false},
		{"page", bytes.Repeat(line, 41)[:4096], false},
		{"alone", line, true},
	} {
		b.Run(c.name, func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "log")
			l, err := crilog.Open(path)
			if err != nil {
				b.Fatal(err)
			}
			ours, theirs, err := pipe("stdout", false)
			if err != nil {
				b.Fatal(err)
			}
			pool := lane.NewPool(nil, nil, nil)
			o := &output{file: ours, log: l.Stream(pool, lane.Owner{Container: "c"}, nil), done: make(chan struct{})}
			got := make(chan struct{}, 1)
			go o.run(func(int, []byte) {
				if c.alone {
					got <- struct{}{}
				}
			})
			var before, after unix.Rusage
			_ = unix.Getrusage(unix.RUSAGE_SELF, &before)
			b.SetBytes(int64(len(c.write)))
			n := 0
			for b.Loop() {
				if n += len(c.write); n > 256<<20 { // the file must not fill the disk
					n = 0
					_ = os.Truncate(path, 0)
				}
				if _, err := theirs.Write(c.write); err != nil {
					b.Fatal(err)
				}
				if c.alone {
					<-got
				}
			}
			theirs.Close()
			<-o.done
			_ = unix.Getrusage(unix.RUSAGE_SELF, &after)
			cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
			b.ReportMetric(float64(cpu.Nanoseconds())/float64(b.N), "cpu-ns/op")
			ours.Close()
			l.Close()
		})
	}
}
