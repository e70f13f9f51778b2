package cli

import (
	"io"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A screen stands between what a guest prints and a person's terminal. A terminal is a machine that obeys its input:
// it can be told to report something as if it had been typed, to set the clipboard or the title, to print, to change
// its character set until nothing can be read. The screen lets text pass, and of the rest
//
//   - strict: only newline and tab (exec, console --log);
//   - otherwise: also what full-screen programs on a serial line need: colours, cursor movement, erasing, scrolling,
//     the alternate screen (console). A sequence that is not on the list is dropped as a whole.
//
// Sequences are those of ECMA-48 and xterm's ctlseqs. The filter never holds back more than maxSequence bytes, and a
// string sequence (OSC, DCS, …) ends at a newline too, so that one never ended cannot silence a console for ever.
type screen struct {
	w      io.Writer
	strict bool

	state   screenState
	pending []byte // the unfinished sequence or UTF-8 character
	skipped int    // bytes of the string sequence so far
	out     []byte
	alt     bool // the alternate screen is on: who detaches has to leave it
}

type screenState int

const (
	onText      screenState = iota
	onUTF8                  // inside a character of several bytes
	onEscape                // after ESC
	onCharset               // after ESC and an intermediate byte
	onControl               // after ESC [
	onLongJunk              // in a control sequence that is too long to be one
	onString                // in OSC, DCS, SOS, PM or APC
	onStringEsc             // after ESC in one of them
)

const (
	maxSequence = 64
	maxString   = 64 << 10
	esc         = 0x1b
	bell        = 0x07
	cancel      = 0x18
	substitute  = 0x1a
)

func newScreen(w io.Writer, strict bool) *screen { return &screen{w: w, strict: strict} }

// Write filters p; parts of a sequence may come in several calls.
func (s *screen) Write(p []byte) (int, error) {
	s.out = s.out[:0]
	for _, b := range p {
		s.feed(b)
	}
	if len(s.out) > 0 {
		if _, err := s.w.Write(s.out); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}

// reset returns the sequence that leaves a terminal usable: attributes, cursor and scrolling region, and the
// alternate screen where the guest had switched to it.
func (s *screen) reset() string {
	if s.alt {
		return "\x1b[!p\x1b[?1049l"
	}
	return "\x1b[!p"
}

func (s *screen) feed(b byte) {
	switch s.state {
	case onText:
		s.text(b)
	case onUTF8:
		s.utf8(b)
	case onEscape:
		s.escape(b)
	case onCharset:
		s.charset(b)
	case onControl:
		s.control(b)
	case onLongJunk:
		if b == esc {
			s.begin(b, onEscape)
		} else if b >= 0x40 && b <= 0x7e || b == '\n' {
			s.state = onText
		}
	case onString, onStringEsc:
		s.str(b)
	}
}

func (s *screen) begin(b byte, state screenState) {
	s.pending = append(s.pending[:0], b)
	s.state = state
}

func (s *screen) text(b byte) {
	switch {
	case b == esc:
		s.begin(b, onEscape)
	case b == '\n' || b == '\t' || b >= 0x20 && b < 0x7f:
		s.out = append(s.out, b)
	case b >= utf8.RuneSelf:
		s.begin(b, onUTF8)
		s.rune()
	case !s.strict && (b == '\r' || b == '\b' || b == bell):
		s.out = append(s.out, b)
	}
}

func (s *screen) utf8(b byte) {
	if b < utf8.RuneSelf || utf8.RuneStart(b) {
		s.out = append(s.out, '?') // the character before was cut short
		s.state = onText
		s.text(b)
		return
	}
	s.pending = append(s.pending, b)
	s.rune()
}

// rune passes the pending character on once it is whole. C1 controls, which some terminals obey, and the characters
// that reorder text are none.
func (s *screen) rune() {
	if !utf8.FullRune(s.pending) {
		return
	}
	s.state = onText
	switch r, n := utf8.DecodeRune(s.pending); {
	case r == utf8.RuneError && n == 1:
		s.out = append(s.out, '?')
	case unicode.IsPrint(r):
		s.out = append(s.out, s.pending...)
	}
}

func (s *screen) escape(b byte) {
	s.pending = append(s.pending, b)
	switch {
	case b == '[':
		s.state = onControl
	case b == ']' || b == 'P' || b == 'X' || b == '^' || b == '_':
		s.state, s.skipped = onString, 0
	case b == esc:
		s.begin(b, onEscape)
	case b >= 0x20 && b <= 0x2f:
		s.state = onCharset
	default:
		s.finish(strings.IndexByte("78DEHM=>", b) >= 0)
		if b < 0x20 {
			s.text(b)
		}
	}
}

// charset passes the choice of US-ASCII or of line drawing, which dialog boxes use; nothing else.
func (s *screen) charset(b byte) {
	s.pending = append(s.pending, b)
	kind := s.pending[1]
	s.finish((kind == '(' || kind == ')') && (b == 'B' || b == '0') && len(s.pending) == 3)
}

func (s *screen) control(b byte) {
	switch {
	case b == esc:
		s.begin(b, onEscape)
	case b >= 0x40 && b <= 0x7e:
		s.pending = append(s.pending, b)
		s.finish(s.harmless())
	case b >= 0x20 && b <= 0x3f:
		if s.pending = append(s.pending, b); len(s.pending) > maxSequence {
			s.state = onLongJunk
		}
	default:
		s.finish(false)
		s.text(b)
	}
}

// finish ends a sequence, and lets it pass if it may.
func (s *screen) finish(pass bool) {
	if pass && !s.strict {
		s.out = append(s.out, s.pending...)
	}
	s.state = onText
}

// plainFinals are the control sequences without a private prefix that only paint: insert, cursor, erase, line and
// character editing, scrolling, repeat, tabs, attributes, scrolling region, save and restore.
const plainFinals = "@ABCDEFGHIJKLMPSTXZ`abdefgmrsu"

// privateModes are the DEC private modes that h and l may set: cursor keys, columns, reverse, origin, wrap, cursor,
// alternate screen, bracketed paste.
var privateModes = map[string]bool{"1": true, "5": true, "6": true, "7": true, "12": true, "25": true, "47": true,
	"1047": true, "1048": true, "1049": true, "2004": true}

// harmless decides on the pending control sequence, ESC [ … final.
func (s *screen) harmless() bool {
	body, final := string(s.pending[2:len(s.pending)-1]), s.pending[len(s.pending)-1]
	if strings.Trim(body, "0123456789;:") == "" {
		switch final {
		case 'h', 'l':
			return body == "4" || body == "20"
		}
		return strings.IndexByte(plainFinals, final) >= 0
	}
	params, private := strings.CutPrefix(body, "?")
	if !private || final != 'h' && final != 'l' {
		return false
	}
	for _, mode := range strings.Split(params, ";") {
		if !privateModes[mode] {
			return false
		}
		if mode == "47" || mode == "1047" || mode == "1049" {
			s.alt = final == 'h'
		}
	}
	return true
}

// str swallows a string sequence to its end.
func (s *screen) str(b byte) {
	s.skipped++
	switch {
	case s.state == onStringEsc && b == '\\', b == bell, b == cancel, b == substitute, s.skipped > maxString:
		s.state = onText
	case s.state == onStringEsc && b != esc:
		s.begin(esc, onEscape)
		s.escape(b)
	case b == '\n':
		s.state = onText
		s.text(b)
	case b == esc:
		s.state = onStringEsc
	default:
		s.state = onString
	}
}
