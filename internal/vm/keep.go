package vm

import (
	"fmt"
	"strings"
	"time"
)

// Keep says how much of what enters a machine is kept from its first checkpoint on, to be given to a clone again. The zero one is the default.
type Keep struct {
	Off   bool          `json:"off,omitempty"`
	Bytes uint64        `json:"bytes,omitempty"`
	Age   time.Duration `json:"age,omitempty"`
}

// The bounds of what is kept, and what is kept where nothing is said. 4 MiB are sixteen segments of the least size.
const (
	DefaultKeepBytes = 64 << 20
	DefaultKeepAge   = 7 * 24 * time.Hour
	minKeep          = 4 << 20
	maxKeep          = 512 << 20
)

// ParseKeep reads "off", SIZE, or SIZE,AGE as in 256M,2d.
func ParseKeep(s string) (Keep, error) {
	if s == "" {
		return Keep{}, nil
	}
	if s == "off" {
		return Keep{Off: true}, nil
	}
	var k Keep
	size, age, aged := strings.Cut(s, ",")
	var err error
	if k.Bytes, err = ParseSize(size); err != nil {
		return Keep{}, err
	}
	if aged {
		if k.Age, err = ParseTTL(age); err != nil {
			return Keep{}, err
		}
	}
	return k, k.Check()
}

// Check reports what is wrong with it.
func (k Keep) Check() error {
	if k.Bytes != 0 && (k.Bytes < minKeep || k.Bytes > maxKeep) {
		return fmt.Errorf("%w: keep %s of inputs: use %s to %s, or off", ErrInvalid, FormatSize(k.Bytes), FormatSize(minKeep), FormatSize(maxKeep))
	}
	if k.Age < 0 {
		return fmt.Errorf("%w: keep inputs for %s", ErrInvalid, k.Age)
	}
	return nil
}

// Bounds are what is in force.
func (k Keep) Bounds() (bytes uint64, age time.Duration) {
	if bytes = k.Bytes; bytes == 0 {
		bytes = DefaultKeepBytes
	}
	if age = k.Age; age == 0 {
		age = DefaultKeepAge
	}
	return bytes, age
}
