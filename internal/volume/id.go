package volume

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
)

// ID names a layer: the BLAKE3 hash of its content where it was imported, a random number where it was written to.
type ID [32]byte

// NewID gives a random id.
func NewID() ID {
	var id ID
	rand.Read(id[:])
	return id
}

// IsZero says that id names no layer.
func (id ID) IsZero() bool { return id == ID{} }

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// ParseID reads what String wrote.
func ParseID(s string) (ID, error) {
	var id ID
	if b, err := hex.DecodeString(s); err != nil || copy(id[:], b) != len(id) || len(b) != len(id) {
		return ID{}, fmt.Errorf("layer id %.80q: want %d hexadecimal digits", s, 2*len(id))
	}
	return id, nil
}

// MarshalText and UnmarshalText carry an id in JSON.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

func (id *ID) UnmarshalText(b []byte) (err error) {
	*id, err = ParseID(string(b))
	return err
}
