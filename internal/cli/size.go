package cli

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
)

var units = map[string]uint64{"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

// parseSize reads a number of bytes as the daemon would: digits and an optional K, M, G or T (also KiB, MB, …), all
// powers of 1024.
func parseSize(s string) (uint64, error) {
	digits := strings.TrimRight(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
	unit := strings.ToLower(s[len(digits):])
	if len(unit) == 3 {
		unit = strings.TrimSuffix(unit, "ib")
	} else {
		unit = strings.TrimSuffix(unit, "b")
	}
	mul, known := units[unit]
	n, err := strconv.ParseUint(digits, 10, 64)
	hi, lo := bits.Mul64(n, mul)
	if err != nil || !known || hi != 0 || lo == 0 {
		return 0, fmt.Errorf("size %q: use a number with K, M, G or T, as in 512M", s)
	}
	return lo, nil
}

// formatSize writes a number of bytes for a person: three digits at most before the unit.
func formatSize(n uint64) string {
	if n < 1<<10 {
		return strconv.FormatUint(n, 10)
	}
	value, unit := float64(n)/(1<<10), 0
	for value >= 1023.5 && unit < 4 {
		value, unit = value/(1<<10), unit+1
	}
	digits := strconv.FormatFloat(value, 'f', 1, 64)
	if value >= 99.95 {
		digits = strconv.FormatFloat(value, 'f', 0, 64)
	}
	return strings.TrimSuffix(digits, ".0") + "KMGTP"[unit:unit+1]
}
