package cli

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// What a guest wrote (a process's name, a file's, an event's text, the message of an error that quotes them) can hold
// escape sequences that rewrite the screen, set the clipboard, or make a terminal type an answer into the shell.
// Text that goes into tables and messages is therefore made of printable characters only; the others are shown as the
// escapes of a Go string, so that a person sees that something was there.

// plain returns s with everything a terminal might act on written out: control characters, broken UTF-8, and the
// invisible characters that reorder or hide text.
func plain(s string) string {
	if isPlain(s) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case unicode.IsPrint(r):
			b.WriteRune(r)
		case r < 0x80:
			b.WriteString(asciiEscape(r))
		case r < 0x10000:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			fmt.Fprintf(&b, `\U%08x`, r)
		}
		i += n
	}
	return b.String()
}

func isPlain(s string) bool {
	for _, r := range s {
		// RuneError stands for a broken byte, or for itself: plain tells them apart.
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return false
		}
	}
	return true
}

func asciiEscape(r rune) string {
	switch r {
	case '\n':
		return `\n`
	case '\r':
		return `\r`
	case '\t':
		return `\t`
	}
	return fmt.Sprintf(`\x%02x`, r)
}

// plainLines is plain for a text of several lines.
func plainLines(s string) string {
	lines := strings.Split(s, "\n")
	for i := range lines {
		lines[i] = plain(strings.TrimRight(lines[i], "\r"))
	}
	return strings.Join(lines, "\n")
}
