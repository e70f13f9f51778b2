package cli

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

// nasty are pieces of which hostile text is made.
var nasty = []string{"\x1b[2J", "\x1b]0;owned\x07", "\x1b]52;c;b3duZWQ=\x1b\\", "\x1bP$q\"p\x1b\\", "\x1b[6n", "\x1b[c", "\x1b[>q", "\x1b[21t",
	"\x1b[?1000h", "\x1b[?1049h", "\x1b[?1049l", "\x1b[5i", "\x1b[31m", "\x1b[>4;2m", "\x1b[1;1H", "\x1b(0", "\x1b%G", "\x1bc", "\x1b#8", "\x1b_x\x1b\\", "\x1b^",
	"\x1bX", "\x1b[", "\x1b", "\x9b31m", "\u009b31m", "\u009d0;x\u009c", "\x0e", "\x0f", "\x05", "\x07", "\b", "\r", "\n", "\t", "\x7f", "\x00",
	"\u202e", "\u2066", "\u200b", "\ufeff", "\u2028", "é", "日本", "😀", "e\u0301", "\xff", "\xc3", "\xe2\x82", "\xf0\x9f", "\\", "\"", "plain", " ",
	"\x1b[?25;1000h", "\x1b[1 q", "\x1b[!p", "\x1b[" + "1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1;1m"}

func nastyText(r *rand.Rand) string {
	var b strings.Builder
	for range r.IntN(12) {
		if r.IntN(4) == 0 {
			b.WriteByte(byte(r.IntN(256)))
		} else {
			b.WriteString(nasty[r.IntN(len(nasty))])
		}
	}
	return b.String()
}

// TestPlain plays a guest that chooses its names: no control character and nothing invisible comes out, and text that
// was harmless comes out as it was.
func TestPlain(t *testing.T) {
	for in, want := range map[string]string{
		"": "",
		"/usr/bin/john --wordlist=x é 日本 😀 \\": "/usr/bin/john --wordlist=x é 日本 😀 \\",
		"\x1b]0;x\x07":        `\x1b]0;x\x07`,
		"a\tb\nc\r":           `a\tb\nc\r`,
		"\xff\x9b31m":         `\xff\x9b31m`,
		"\u009b31m\u202eexe":  `\u009b31m\u202eexe`,
		"\ufffd":              "\ufffd",
		"\U000e0001":          `\U000e0001`,
		"non\u00a0breaking":   `non\u00a0breaking`,
		"zero\u200bwidth\x7f": `zero\u200bwidth\x7f`,
	} {
		if got := plain(in); got != want {
			t.Errorf("plain(%q) = %q, want %q", in, got, want)
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 5_000 {
		s := nastyText(r)
		checkPlain(t, s)
		checkJSON(t, s)
	}
}

func checkPlain(t *testing.T, in string) {
	t.Helper()
	out := plain(in)
	if !utf8.ValidString(out) || strings.ContainsFunc(out, func(r rune) bool { return !unicode.IsPrint(r) }) {
		t.Fatalf("plain(%q) = %q holds what a terminal may act on", in, out)
	}
	if again := plain(out); again != out {
		t.Fatalf("plain(%q) = %q, and once more %q", in, out, again)
	}
}

func FuzzPlain(f *testing.F) {
	for _, s := range nasty {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		checkPlain(t, s)
		// A table of it has as many lines as rows, whatever the cells hold.
		tab := newTable("A", ">B")
		tab.add(s, s)
		var b bytes.Buffer
		if err := tab.write(&b, 20); err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n") {
			checkPlain(t, line)
		}
		if n := strings.Count(b.String(), "\n"); n != 2 {
			t.Fatalf("a row of %q makes %d lines", s, n)
		}
		checkJSON(t, s)
		if e := fieldText(s); strings.ContainsFunc(e, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Fatalf("field %q is printed as %q", s, e)
		}
	})
}

// checkJSON: the JSON form says the same, without a byte that a terminal may act on.
func checkJSON(t *testing.T, s string) {
	t.Helper()
	s = strings.ToValidUTF8(s, "?") // as protobuf's strings are
	text, err := encode(map[string]string{"comm": s})
	if err != nil {
		t.Fatal(err)
	}
	if strings.ContainsFunc(string(text), func(r rune) bool { return !unicode.IsPrint(r) }) {
		t.Fatalf("JSON of %q is %q", s, text)
	}
	var back map[string]string
	if err := json.Unmarshal(text, &back); err != nil || back["comm"] != s {
		t.Fatalf("JSON of %q reads as %q, %v", s, back["comm"], err)
	}
}

// filtered runs text through a screen, in pieces of n bytes.
func filtered(text string, strict bool, n int) string {
	var b bytes.Buffer
	s := newScreen(&b, strict)
	for len(text) > 0 {
		k := min(n, len(text))
		if _, err := s.Write([]byte(text[:k])); err != nil {
			panic(err)
		}
		text = text[k:]
	}
	return b.String()
}

func TestScreen(t *testing.T) {
	for _, c := range []struct{ in, console, strict string }{
		{"login: ", "login: ", "login: "},
		{"a\r\nb\tc\bd", "a\r\nb\tc\bd", "a\nb\tcd"},
		{"\x1b[1;31mred\x1b[0m", "\x1b[1;31mred\x1b[0m", "red"},
		{"\x1b[38:2::1:2:3mx", "\x1b[38:2::1:2:3mx", "x"},
		{"\x1b[?1049h\x1b[2J\x1b[H~\x1b[?1049l", "\x1b[?1049h\x1b[2J\x1b[H~\x1b[?1049l", "~"},
		{"\x1b(0lqk\x1b(B", "\x1b(0lqk\x1b(B", "lqk"},
		{"\x1b]0;title\x07x", "x", "x"},
		{"\x1b]52;c;ZXZpbA==\x1b\\x", "x", "x"}, // the clipboard
		{"\x1bP+q544e\x1b\\x", "x", "x"},
		{"\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link", "link"},
		{"\x1b[c\x1b[>c\x1b[6n\x1b[?6n\x1b[21t\x1b[x\x1bZ\x05x", "x", "x"}, // all that make a terminal answer
		{"\x1b[?u\x1b[>q\x1b[?25$px", "x", "x"},
		{"\x1b[5ix\x1b[4iy", "xy", "xy"},       // the printer
		{"\x1bcx\x1b#8y\x1b%@z", "xyz", "xyz"}, // reset, test pattern, character set
		{"\x0ex\x0f", "x", "x"},
		{"\x1b[?1000hx\x1b[?1006;25hy", "xy", "xy"}, // the mouse
		{"\u009b31mx\u0090y", "31mxy", "31mxy"},
		{"\x9b31m", "?31m", "?31m"},
		{"\u202egnp", "gnp", "gnp"},
		{"é日😀", "é日😀", "é日😀"},
		{"\xe2\x82x", "?x", "?x"},
		{"\xe2\x1b[1mx", "?\x1b[1mx", "?x"},
		{"\x1b]never ended\nnext", "\nnext", "\nnext"},
		{"\x1b]x\x1b[1my", "\x1b[1my", "y"},
		{"\x1b[\x1b[1mx", "\x1b[1mx", "x"},
		{"\x1b[3\nx", "\nx", "\nx"},
	} {
		for n := 1; n <= 5; n++ {
			if got := filtered(c.in, false, n); got != c.console {
				t.Errorf("console shows %q as %q, want %q (pieces of %d)", c.in, got, c.console, n)
			}
			if got := filtered(c.in, true, n); got != c.strict {
				t.Errorf("strictly, %q shows as %q, want %q (pieces of %d)", c.in, got, c.strict, n)
			}
		}
	}
}

// TestScreenGoesOn plays a guest that begins a sequence and never ends it: the console must not fall silent.
func TestScreenGoesOn(t *testing.T) {
	for _, start := range []string{"\x1b]", "\x1bP", "\x1b[", "\x1b[1;1;", "\x1b_", "\x1b(", "\x1b", "\xf0\x9f"} {
		if got := filtered(start+strings.Repeat("1", 2*maxString)+"\nsome text", false, 1000); !strings.HasSuffix(got, "some text") {
			t.Errorf("after %q nothing is shown any more", start)
		}
	}
}

// TestScreenReset: who detaches inside a full-screen program gets the normal screen back.
func TestScreenReset(t *testing.T) {
	s := newScreen(&bytes.Buffer{}, false)
	s.Write([]byte("\x1b[?1049h"))
	if got := s.reset(); got != "\x1b[!p\x1b[?1049l" {
		t.Errorf("reset is %q", got)
	}
	s.Write([]byte("\x1b[?1049l"))
	if got := s.reset(); got != "\x1b[!p" {
		t.Errorf("reset is %q", got)
	}
}

// passed is what a console lets through, said once more in another way than screen.go says it.
var passed = regexp.MustCompile("^(?:[\\n\\t\\r\\x08\\x07]|[^\\x00-\\x1f\\x7f-\\x{9f}]|\x1b[78DEHM=>]|\x1b[()][0B]|" +
	"\x1b\\[[0-9;:]*[@A-IJKLMPSTXZ`abdefgmrsu]|\x1b\\[(?:4|20)[hl]|" +
	"\x1b\\[\\?(?:1|5|6|7|12|25|47|1047|1048|1049|2004)(?:;(?:1|5|6|7|12|25|47|1047|1048|1049|2004))*[hl])*$")

func FuzzScreen(f *testing.F) {
	for _, s := range nasty {
		f.Add(s, uint8(3))
	}
	f.Add(strings.Join(nasty, ""), uint8(7))
	f.Fuzz(func(t *testing.T, s string, piece uint8) {
		n := int(piece)%16 + 1
		for _, strict := range []bool{false, true} {
			whole := filtered(s, strict, len(s)+1)
			if parts := filtered(s, strict, n); parts != whole {
				t.Fatalf("%q shows as %q, in pieces of %d as %q", s, whole, n, parts)
			}
			if again := filtered(whole, strict, 4096); again != whole {
				t.Fatalf("%q shows as %q, and once more as %q", s, whole, again)
			}
			if !utf8.ValidString(whole) || !passed.MatchString(whole) {
				t.Fatalf("%q lets %q through", s, whole)
			}
			if strict && strings.ContainsFunc(whole, func(r rune) bool { return r != '\n' && r != '\t' && !unicode.IsPrint(r) }) {
				t.Fatalf("strictly, %q lets %q through", s, whole)
			}
		}
	})
}

func TestScreenHostile(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 5_000 {
		s := nastyText(r)
		if got := filtered(s, false, 1+r.IntN(9)); !passed.MatchString(got) {
			t.Fatalf("%q lets %q through", s, got)
		}
	}
}
