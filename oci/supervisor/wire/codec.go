package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// MaxFrame is the longest JSON text of a frame, in bytes.
	MaxFrame = 16 << 20
	// MaxFDs is the most descriptors of one frame; the kernel allows 253 per message.
	MaxFDs = 250

	headerLen = 4
	readSize  = 8 << 10
)

// ErrProtocol is a violation of the framing by the peer. The connection is of
// no more use after it.
var ErrProtocol = errors.New("wire protocol violated")

// Conn sends and receives frames over a connected unix stream socket.
//
// A frame is a 4-byte big-endian length and that many bytes of JSON. Its
// descriptors ride with its first byte. The kernel may deliver descriptors
// together with bytes of an earlier frame, never after the byte they were sent
// with, so the receiver queues them and Frame.FDs says how many to take.
//
// Send may be called concurrently, Recv by one goroutine at a time.
type Conn struct {
	file *os.File
	raw  syscall.RawConn

	sendMu sync.Mutex

	dec decoder
	fds []*os.File // received, not yet claimed by a frame
	oob []byte
}

// NewConn takes over the socket fd and makes it non-blocking.
func NewConn(fd int) (*Conn, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "socket")
	raw, err := f.SyscallConn()
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("socket: %w", err)
	}
	return &Conn{file: f, raw: raw, oob: make([]byte, unix.CmsgSpace(253*4))}, nil
}

// Close closes the socket and wakes a blocked Send and Recv. Descriptors that
// were received and not claimed are closed by the last Recv.
func (c *Conn) Close() error { return c.file.Close() }

// Encode returns the bytes of f on the wire, with n descriptors.
func Encode(f Frame, n int) ([]byte, error) {
	if n > MaxFDs {
		return nil, fmt.Errorf("frame: %d descriptors, at most %d: %w", n, MaxFDs, ErrProtocol)
	}
	f.FDs = n
	text, err := json.Marshal(f)
	if err != nil {
		return nil, fmt.Errorf("frame: %w", err)
	}
	if len(text) > MaxFrame {
		return nil, fmt.Errorf("frame: %d bytes, at most %d: %w", len(text), MaxFrame, ErrProtocol)
	}
	b := make([]byte, headerLen, headerLen+len(text))
	binary.BigEndian.PutUint32(b, uint32(len(text)))
	return append(b, text...), nil
}

// Send writes f with files, which stay the caller's. When it returns an error
// of the socket a part of the frame may be out: close the connection.
func (c *Conn) Send(f Frame, files ...*os.File) error {
	b, err := Encode(f, len(files))
	if err != nil {
		return err
	}
	return c.SendEncoded(b, files...)
}

// SendEncoded is Send of a frame that Encode has made.
func (c *Conn) SendEncoded(b []byte, files ...*os.File) error {
	return withFDs(files, nil, func(fds []int) error {
		var oob []byte
		if len(fds) > 0 {
			oob = unix.UnixRights(fds...)
		}
		c.sendMu.Lock()
		defer c.sendMu.Unlock()
		var serr error
		err := c.raw.Write(func(fd uintptr) bool {
			for len(b) > 0 {
				n, err := unix.SendmsgN(int(fd), b, oob, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
				switch {
				case err == unix.EAGAIN:
					return false
				case err == unix.EINTR:
					continue
				case err != nil:
					serr = err
					return true
				}
				b, oob = b[n:], nil
			}
			return true
		})
		return errors.Join(err, serr)
	})
}

// withFDs calls f with the descriptors of files, which cannot be closed meanwhile.
// os.File.Fd is not used: it would make the file blocking for everybody.
func withFDs(files []*os.File, fds []int, f func([]int) error) error {
	if len(files) == 0 {
		return f(fds)
	}
	raw, err := files[0].SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	err = raw.Control(func(fd uintptr) { ferr = withFDs(files[1:], append(fds, int(fd)), f) })
	return errors.Join(err, ferr)
}

// SetSendDeadline bounds later and blocked Sends.
func (c *Conn) SetSendDeadline(t time.Time) error { return c.file.SetWriteDeadline(t) }

// SetRecvDeadline bounds later and blocked Recvs.
func (c *Conn) SetRecvDeadline(t time.Time) error { return c.file.SetReadDeadline(t) }

// Recv returns the next frame and its descriptors, which are the caller's to
// close. It returns io.EOF when the peer closed between two frames.
func (c *Conn) Recv() (_ Frame, _ []*os.File, err error) {
	defer func() {
		if err != nil {
			CloseFiles(c.fds)
			c.fds = nil
		}
	}()
	for {
		f, ok, err := c.dec.next()
		if err != nil {
			return Frame{}, nil, err
		}
		if ok {
			if f.FDs > len(c.fds) {
				return Frame{}, nil, fmt.Errorf("frame: %d descriptors announced, %d came: %w", f.FDs, len(c.fds), ErrProtocol)
			}
			files := c.fds[:f.FDs:f.FDs]
			c.fds = c.fds[f.FDs:]
			return f, files, nil
		}
		// Descriptors that came before the first byte of the next frame belong to none.
		if c.dec.empty() && len(c.fds) > 0 {
			return Frame{}, nil, fmt.Errorf("%d descriptors without a frame: %w", len(c.fds), ErrProtocol)
		}
		if err := c.fill(); err != nil {
			if err == io.EOF && !c.dec.empty() {
				err = io.ErrUnexpectedEOF
			}
			return Frame{}, nil, err
		}
	}
}

func (c *Conn) fill() error {
	buf := c.dec.space(readSize)
	var n, oobn, flags int
	var rerr error
	err := c.raw.Read(func(fd uintptr) bool {
		for {
			n, oobn, flags, _, rerr = unix.Recvmsg(int(fd), buf, c.oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
			if rerr == unix.EINTR {
				continue
			}
			return rerr != unix.EAGAIN
		}
	})
	if err := errors.Join(err, rerr); err != nil {
		return err
	}
	if oobn > 0 {
		msgs, err := unix.ParseSocketControlMessage(c.oob[:oobn])
		if err != nil {
			return fmt.Errorf("control message: %w: %w", err, ErrProtocol)
		}
		for i := range msgs {
			fds, err := unix.ParseUnixRights(&msgs[i])
			if err != nil {
				continue // another kind of control message carries nothing to close
			}
			for _, fd := range fds {
				c.fds = append(c.fds, os.NewFile(uintptr(fd), "received"))
			}
		}
	}
	// There is room for all that a message may have: our table is full.
	if flags&unix.MSG_CTRUNC != 0 {
		return fmt.Errorf("descriptors were cut off: %w: %w", unix.EMFILE, ErrProtocol)
	}
	if n == 0 {
		return io.EOF
	}
	c.dec.filled(n)
	return nil
}

// CloseFiles closes received or passed descriptors; nil ones are skipped.
func CloseFiles(files []*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close()
		}
	}
}

// decoder cuts a byte stream into frames.
type decoder struct {
	buf []byte // received and not yet decoded
}

func (d *decoder) empty() bool { return len(d.buf) == 0 }

// space returns room for at least n more bytes behind those held. It grows with
// what has arrived, not with the announced length: a peer cannot make us
// allocate what it does not send.
func (d *decoder) space(n int) []byte {
	if cap(d.buf)-len(d.buf) < n {
		b := make([]byte, len(d.buf), max(2*len(d.buf), len(d.buf)+n))
		copy(b, d.buf)
		d.buf = b
	}
	return d.buf[len(d.buf):cap(d.buf)]
}

func (d *decoder) filled(n int) { d.buf = d.buf[:len(d.buf)+n] }

// next takes one frame off the buffer; ok is false when more bytes are needed.
func (d *decoder) next() (f Frame, ok bool, err error) {
	if len(d.buf) < headerLen {
		return f, false, nil
	}
	n := binary.BigEndian.Uint32(d.buf)
	if n > MaxFrame {
		return f, false, fmt.Errorf("frame: %d bytes, at most %d: %w", n, MaxFrame, ErrProtocol)
	}
	if len(d.buf) < headerLen+int(n) {
		return f, false, nil
	}
	// Unmarshal copies what the frame keeps (Body too), so the buffer is free again.
	if err := json.Unmarshal(d.buf[headerLen:headerLen+int(n)], &f); err != nil {
		return Frame{}, false, fmt.Errorf("frame: %w: %w", err, ErrProtocol)
	}
	if f.FDs < 0 || f.FDs > MaxFDs {
		return Frame{}, false, fmt.Errorf("frame: %d descriptors, at most %d: %w", f.FDs, MaxFDs, ErrProtocol)
	}
	rest := copy(d.buf, d.buf[headerLen+int(n):])
	d.buf = d.buf[:rest]
	if rest == 0 && cap(d.buf) > 8*readSize {
		d.buf = nil // do not keep the memory of one huge frame
	}
	return f, true, nil
}
