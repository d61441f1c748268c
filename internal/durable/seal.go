package durable

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
)

// sealed is a small record with its checksum: one line of JSON.
type sealed struct {
	Sum  string          `json:"sha256"`
	Body json.RawMessage `json:"body"`
}

// Seal is v as JSON with a checksum, for a file of which a torn or flipped bit
// must be noticed.
func Seal(v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(body)
	return json.Marshal(sealed{hex.EncodeToString(sum[:]), body})
}

// Unseal is the inverse of Seal. What is not whole is errdefs.ErrDataLoss.
func Unseal(b []byte, v any) error {
	var s sealed
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	if sum := sha256.Sum256(s.Body); hex.EncodeToString(sum[:]) != s.Sum {
		return fmt.Errorf("checksum differs: %w", errdefs.ErrDataLoss)
	}
	if err := json.Unmarshal(s.Body, v); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	return nil
}

// UnsealOld is Unseal for files that earlier versions wrote without a checksum:
// such a one is taken as it is.
func UnsealOld(b []byte, v any) error {
	err := Unseal(b, v)
	if err == nil {
		return nil
	}
	var fields map[string]json.RawMessage
	if json.Unmarshal(b, &fields) != nil || fields["sha256"] != nil || fields["body"] != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
	}
	return nil
}
