package main

import "errors"

// int80 makes a system call by the 32-bit entry.
func int80(nr uint32) uint32

// compat asks for its pid by the 32-bit number.
func compat() error {
	if r := int80(20); int32(r) < 0 {
		return errors.New("refused")
	}
	return nil
}
