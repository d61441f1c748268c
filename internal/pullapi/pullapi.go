// Package pullapi lets a local client watch a pull, which CRI has no way to
// show: one HTTP request on a unix socket beside the CRI socket, answered with
// a line of JSON for each change of progress and a last one with the result.
// This is the client's side; cri/pulls serves it.
package pullapi

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
)

// SocketFor is where the socket is that belongs to a CRI socket.
func SocketFor(cri string) string { return strings.TrimSuffix(cri, ".sock") + "-api.sock" }

// Message is one line. Image is set in the last line of a pull that succeeded
// and Error in that of one that failed.
type Message struct {
	Layer    string `json:"layer,omitempty"`
	Done     int64  `json:"done,omitempty"`
	Total    int64  `json:"total,omitempty"`
	Complete bool   `json:"complete,omitempty"`
	Image    string `json:"image,omitempty"`
	Error    string `json:"error,omitempty"`
}

// ErrNoServer says that nobody serves the socket; pull over CRI instead.
var ErrNoServer = errors.New("no pull socket")

// Pull pulls ref over socket, calls each with every line of progress and
// returns the image's id.
func Pull(ctx context.Context, socket, ref string, each func(Message)) (string, error) {
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		c, err := d.DialContext(ctx, "unix", socket)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNoServer, err)
		}
		return c, nil
	}}
	defer t.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://berth/v1/pull?ref="+url.QueryEscape(ref), nil)
	if err != nil {
		return "", err
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("pull socket: %s", resp.Status)
	}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		var m Message
		if err := json.Unmarshal(lines.Bytes(), &m); err != nil {
			return "", fmt.Errorf("pull socket: %w", err)
		}
		switch {
		case m.Error != "":
			return "", errors.New(m.Error)
		case m.Image != "":
			return m.Image, nil
		}
		each(m)
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("pull socket: %w", err)
	}
	return "", errors.New("pull socket: the daemon ended before the pull did")
}
