package systemd

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	sd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/berth-runtime/berth/oci/embedded/cgroup"
)

// unit is the scope of one container.
type unit struct {
	driver    *Driver
	name      name
	resources *specs.LinuxResources // of a scope that is still to be started
}

var _ cgroup.Unit = (*unit)(nil)

// Start makes the scope. A failed one of the same name, which systemd keeps to
// tell of, is forgotten first.
func (u *unit) Start(pid int) error {
	limits, err := u.driver.properties(u.resources)
	if err != nil {
		return err
	}
	policy, err := u.driver.oomPolicy(u.resources)
	if err != nil {
		return err
	}
	io := "IOAccounting"
	var devices []sd.Property
	if !u.driver.host.V2() {
		io = "BlockIOAccounting"
		if devices, err = deviceProperties(u.resources.Devices); err != nil {
			return err
		}
	}
	props := []sd.Property{
		sd.PropDescription("container " + u.name.scope),
		sd.PropSlice(u.name.slice),
		property("Delegate", true), // or systemd takes back what is made below the scope
		property("PIDs", []uint32{uint32(pid)}),
		property("MemoryAccounting", true),
		property("CPUAccounting", true),
		property(io, true),
		property("TasksAccounting", true),
		property("DefaultDependencies", false), // at shutdown, whoever made the container ends it
	}
	props = append(append(append(props, limits...), policy...), devices...)
	err = u.job(func(ctx context.Context, c *sd.Conn, done chan<- string) error {
		_, err := c.StartTransientUnitContext(ctx, u.name.scope, "replace", props, done)
		if isError(err, "org.freedesktop.systemd1.UnitExists") {
			_ = c.ResetFailedUnitContext(ctx, u.name.scope)
			_, err = c.StartTransientUnitContext(ctx, u.name.scope, "replace", props, done)
		}
		if isError(err, "org.freedesktop.systemd1.UnitExists") {
			return fmt.Errorf("%w: %w", err, errdefs.ErrAlreadyExists)
		}
		return err
	})
	if err != nil {
		_ = u.forget()
		return fmt.Errorf("systemd: start %s: %w", u.name.scope, err)
	}
	return nil
}

// Update implements cgroup.Unit. The values are systemd's until it restarts the
// machine: runtime properties.
func (u *unit) Update(r *specs.LinuxResources) error {
	props, err := u.driver.properties(r)
	if err != nil {
		return err
	}
	if !u.driver.host.V2() && len(r.Devices) > 0 {
		devices, err := deviceProperties(r.Devices)
		if err != nil {
			return err
		}
		props = append(props, devices...)
	}
	if len(props) == 0 {
		return nil
	}
	err = u.driver.call(func(ctx context.Context, c *sd.Conn) error {
		return c.SetUnitPropertiesContext(ctx, u.name.scope, true, props...)
	})
	if err != nil {
		return fmt.Errorf("systemd: set properties of %s: %w", u.name.scope, err)
	}
	return nil
}

// Stop implements cgroup.Unit. A scope that failed stays listed until it is
// forgotten.
func (u *unit) Stop() error {
	err := u.job(func(ctx context.Context, c *sd.Conn, done chan<- string) error {
		_, err := c.StopUnitContext(ctx, u.name.scope, "replace", done)
		return err
	})
	ferr := u.forget()
	if isError(err, noSuchUnit) {
		err = nil
	}
	if isError(ferr, noSuchUnit) {
		ferr = nil
	}
	if err = errors.Join(err, ferr); err != nil {
		return fmt.Errorf("systemd: stop %s: %w", u.name.scope, err)
	}
	return nil
}

const noSuchUnit = "org.freedesktop.systemd1.NoSuchUnit"

func (u *unit) forget() error {
	return u.driver.call(func(ctx context.Context, c *sd.Conn) error {
		return c.ResetFailedUnitContext(ctx, u.name.scope)
	})
}

// job starts a job of systemd and waits for its end.
func (u *unit) job(start func(context.Context, *sd.Conn, chan<- string) error) error {
	return u.driver.call(func(ctx context.Context, c *sd.Conn) error {
		done := make(chan string, 1)
		if err := start(ctx, c, done); err != nil {
			return err
		}
		select {
		case result := <-done:
			if result != "done" {
				return fmt.Errorf("its job ended as %q: see the journal of systemd: %w", result, errdefs.ErrUnavailable)
			}
			return nil
		case <-ctx.Done():
			return fmt.Errorf("not done after %s: %w", callWait, errdefs.ErrUnavailable)
		}
	})
}

func isError(err error, name string) bool {
	var e dbus.Error
	return errors.As(err, &e) && e.Name == name
}
