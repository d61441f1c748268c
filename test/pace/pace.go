// Package pace lets tests be patient on slow machines, such as the emulated one
// of `make test-vm`.
package pace

import (
	"fmt"
	"os"
	"strconv"
	"time"
)

// Factor is $BERTH_TEST_SLOW, how many times slower than a developer's machine
// this one is; 1 when it is not set.
var Factor = factor(os.Getenv("BERTH_TEST_SLOW"))

func factor(s string) int {
	if s == "" {
		return 1
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		panic(fmt.Sprintf("BERTH_TEST_SLOW=%q: want a whole number of at least 1", s))
	}
	return n
}

// Wait is how long to wait here for what takes less than d on a fast machine.
// It is for time limits, not for what a test measures or must not exceed.
func Wait(d time.Duration) time.Duration { return d * time.Duration(Factor) }
