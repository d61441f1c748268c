package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
)

// confExtensions are the file names of the conf dir that count.
var confExtensions = []string{".conflist", ".conf", ".json"}

// loadConf returns the first valid network configuration of dir in the order
// of file names, and the file it came from. It returns nil without an error
// when dir is missing or holds no configuration; when it holds only invalid
// ones, that is an error: pods must not slip onto another network because of a
// typing mistake.
func loadConf(dir string) (*libcni.NetworkConfigList, string, error) {
	entries, err := os.ReadDir(dir) // sorted by name
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, "", nil
		}
		return nil, "", fmt.Errorf("cni conf dir: %w", err)
	}
	var invalid []error
	for _, e := range entries {
		if e.IsDir() || !slices.Contains(confExtensions, filepath.Ext(e.Name())) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		list, err := loadFile(path)
		if err == nil {
			return list, path, nil
		}
		invalid = append(invalid, fmt.Errorf("%s: %w", path, err))
	}
	if len(invalid) > 0 {
		return nil, "", fmt.Errorf("cni conf dir %s: holds no valid configuration; repair or remove: %w: %w", dir, errors.Join(invalid...), errdefs.ErrUnavailable)
	}
	return nil, "", nil
}

func loadFile(path string) (*libcni.NetworkConfigList, error) {
	var list *libcni.NetworkConfigList
	var err error
	if filepath.Ext(path) == ".conflist" {
		list, err = libcni.NetworkConfFromFile(path)
	} else {
		var b []byte
		if b, err = os.ReadFile(path); err == nil {
			list, err = parseSingle(b)
		}
	}
	if err != nil {
		return nil, err
	}
	if err := checkList(list); err != nil {
		return nil, err
	}
	return list, nil
}

// parseSingle reads a configuration of one plugin. A list under the wrong file
// name is recognised by its "plugins".
func parseSingle(b []byte) (*libcni.NetworkConfigList, error) {
	var probe struct {
		CNIVersion string          `json:"cniVersion"`
		Name       string          `json:"name"`
		Plugins    json.RawMessage `json:"plugins"`
	}
	if err := json.Unmarshal(b, &probe); err != nil {
		return nil, err
	}
	if probe.Plugins != nil {
		return libcni.NetworkConfFromBytes(b)
	}
	list, err := json.Marshal(map[string]any{"cniVersion": probe.CNIVersion, "name": probe.Name, "plugins": []json.RawMessage{b}})
	if err != nil {
		return nil, err
	}
	return libcni.NetworkConfFromBytes(list)
}

// checkList refuses what must not reach the file system: the network's name
// becomes part of a file name, a plugin's type a program (CVE-2021-20206).
func checkList(list *libcni.NetworkConfigList) error {
	if err := utils.ValidateNetworkName(list.Name); err != nil {
		return fmt.Errorf("network name %q: %w", list.Name, err)
	}
	if len(list.Plugins) == 0 {
		return errors.New("plugins: none given")
	}
	for i, p := range list.Plugins {
		if t := p.Network.Type; t == "" || t == "." || t == ".." || strings.ContainsAny(t, "/\\\x00") {
			return fmt.Errorf("plugins[%d].type %q: want the name of a program in the bin dir, without a path: %w", i, t, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// encodeList writes list as one self-contained configuration, from which DEL
// works also when the file it came from has changed or gone.
func encodeList(list *libcni.NetworkConfigList) (json.RawMessage, error) {
	plugins := make([]json.RawMessage, len(list.Plugins))
	for i, p := range list.Plugins {
		plugins[i] = p.Bytes
	}
	return json.Marshal(map[string]any{
		"cniVersion": list.CNIVersion, "name": list.Name, "disableCheck": list.DisableCheck,
		"disableGC": list.DisableGC, "loadOnlyInlinedPlugins": true, "plugins": plugins,
	})
}

// decodeList is the inverse of encodeList.
func decodeList(b []byte) (*libcni.NetworkConfigList, error) {
	list, err := libcni.NetworkConfFromBytes(b)
	if err != nil {
		return nil, err
	}
	return list, checkList(list)
}
