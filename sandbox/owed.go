package sandbox

import (
	"time"

	"k8s.io/klog/v2"
)

// oweInterval is how soon a record that a full disk refused is written once
// there is space again.
const oweInterval = 5 * time.Second

// writeOwed writes the records of what has happened while the disk was full:
// until then an exit code, say, is in the supervisor's memory and in ours alone.
func (e *Engine) writeOwed() {
	t := time.NewTicker(oweInterval)
	defer t.Stop()
	for {
		select {
		case <-e.ctx.Done():
			return
		case <-t.C:
			e.payOwed()
		}
	}
}

func (e *Engine) payOwed() {
	written, owed := 0, 0
	count := func(err error) bool {
		if err != nil {
			owed++
			return true
		}
		written++
		return false
	}
	v := e.view.Load()
	for _, p := range v.pods {
		p.mu.Lock()
		if p.owed {
			p.owed = count(e.podBook.Write(string(p.id), &p.rec))
		}
		p.mu.Unlock()
	}
	for _, c := range v.containers {
		c.mu.Lock()
		if c.owed {
			c.owed = count(e.ctrBook.Write(string(c.id), &c.rec))
		}
		c.mu.Unlock()
	}
	if written > 0 {
		klog.InfoS("Records that could not be written before are written now", "records", written, "left", owed)
	}
}
