package systemd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/godbus/dbus/v5"
)

// dialUser connects to the session bus of the calling user. It never starts one.
func dialUser() (*dbus.Conn, error) {
	addr, err := sessionBus(os.Getenv)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return nil, err
	}
	uid, err := outerUID(os.Getuid(), string(text))
	if err != nil {
		return nil, err
	}
	return dialBus(addr, uid)
}

// sessionBus finds the address of the user's session bus.
func sessionBus(getenv func(string) string) (string, error) {
	if addr := getenv("DBUS_SESSION_BUS_ADDRESS"); addr != "" {
		return addr, nil
	}
	if dir := getenv("XDG_RUNTIME_DIR"); dir != "" {
		bus := filepath.Join(dir, "bus")
		if _, err := os.Stat(bus); err == nil {
			return "unix:path=" + dbus.EscapeBusAddressValue(bus), nil
		}
	}
	return "", fmt.Errorf("no session bus: set DBUS_SESSION_BUS_ADDRESS, or XDG_RUNTIME_DIR to a directory with the socket \"bus\" (package dbus-user-session; log in anew): %w", errdefs.ErrFailedPrecondition)
}

// outerUID is the user id that the bus, outside of our user namespace, sees.
func outerUID(uid int, uidMap string) (int, error) {
	for line := range strings.Lines(uidMap) {
		var in, out, count int
		if _, err := fmt.Sscan(line, &in, &out, &count); err == nil && uid >= in && uid-in < count {
			return out + uid - in, nil
		}
	}
	return 0, errors.New("/proc/self/uid_map: our user id is not mapped")
}

func dialBus(addr string, uid int) (*dbus.Conn, error) {
	conn, err := dbus.Dial(addr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", addr, err)
	}
	if err := conn.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(uid))}); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s: authenticate as user %d: %w", addr, uid, err)
	}
	if err := conn.Hello(); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s: hello: %w", addr, err)
	}
	return conn, nil
}
