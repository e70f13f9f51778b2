package vm

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
	"time"
)

var units = map[string]uint64{"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

// ParseSize reads a number of bytes: digits and an optional unit K, M, G or T (also KiB, MB, …), all powers of 1024.
func ParseSize(s string) (uint64, error) {
	i := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' })
	if i < 0 {
		i = len(s)
	}
	n, err := strconv.ParseUint(s[:i], 10, 64)
	unit := strings.ToLower(s[i:])
	unit = strings.TrimSuffix(strings.TrimSuffix(unit, "ib"), "b")
	mul, ok := units[unit]
	hi, lo := bits.Mul64(n, mul)
	if err != nil || !ok || hi != 0 || lo == 0 {
		return 0, fmt.Errorf("%w: size %q: use a number with K, M, G or T, as in 512M", ErrInvalid, s)
	}
	return lo, nil
}

// FormatSize writes a number of bytes in the largest unit that divides it, as ParseSize reads it.
func FormatSize(n uint64) string {
	for _, u := range []struct {
		name string
		size uint64
	}{{"T", 1 << 40}, {"G", 1 << 30}, {"M", 1 << 20}, {"K", 1 << 10}} {
		if n >= u.size && n%u.size == 0 {
			return strconv.FormatUint(n/u.size, 10) + u.name
		}
	}
	return strconv.FormatUint(n, 10)
}

// ParseTTL reads how long a machine may live: Go's duration syntax, and d for days of 24 hours.
func ParseTTL(s string) (time.Duration, error) {
	var d time.Duration
	var err error
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n int
		n, err = strconv.Atoi(days)
		d = time.Duration(n) * 24 * time.Hour
		if n > 36500 {
			err = strconv.ErrRange
		}
	} else {
		d, err = time.ParseDuration(s)
	}
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("%w: ttl %q: use a duration such as 90m, 8h or 7d", ErrInvalid, s)
	}
	return d, nil
}
