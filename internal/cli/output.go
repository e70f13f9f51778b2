package cli

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/term"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"vigia/internal/api"
)

// printJSON prints one message.
func (a *app) printJSON(m proto.Message) error { return a.printValue(api.JSONValue(m)) }

// printList prints messages as one array, [] where there are none.
func printList[M proto.Message](a *app, list []M) error {
	values := make([]any, len(list))
	for i, m := range list {
		values[i] = api.JSONValue(m)
	}
	return a.printValue(values)
}

func (a *app) printValue(v any) error {
	text, err := encode(v)
	if err != nil {
		return err
	}
	_, err = a.std.Out.Write(append(text, '\n'))
	return err
}

func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return asciiControls(bytes.TrimRight(b.Bytes(), "\n")), err
}

// asciiControls escapes what encoding/json leaves as it is though a terminal may act on it: DEL, the C1 controls, and
// what reorders or hides text. Outside of strings JSON has none of these, so the value stays the same.
func asciiControls(text []byte) []byte {
	if isPlain(string(text)) {
		return text
	}
	out := make([]byte, 0, len(text)+16)
	for _, r := range string(text) {
		switch {
		case unicode.IsPrint(r):
			out = utf8.AppendRune(out, r)
		case r < 0x10000:
			out = fmt.Appendf(out, `\u%04x`, r)
		default:
			high, low := utf16.EncodeRune(r)
			out = fmt.Appendf(out, `\u%04x\u%04x`, high, low)
		}
	}
	return out
}

// printf prints text. Strings that a guest may have chosen must have gone through plain.
func (a *app) printf(format string, v ...any) error {
	_, err := fmt.Fprintf(a.std.Out, format, v...)
	return err
}

// table is aligned text. A header that begins with '>' sets its column to the right.
type table struct {
	header []string
	rows   [][]string
}

func newTable(header ...string) *table { return &table{header: header} }

// add makes every cell plain: no caller can forget it.
func (t *table) add(cells ...string) {
	for i := range cells {
		cells[i] = plain(cells[i])
		if cells[i] == "" {
			cells[i] = "-"
		}
	}
	t.rows = append(t.rows, cells)
}

// write prints the table, its lines cut at width where width is not 0.
func (t *table) write(w io.Writer, width int) error {
	right := make([]bool, len(t.header))
	size := make([]int, len(t.header))
	head := make([]string, len(t.header))
	for i, h := range t.header {
		head[i], right[i] = strings.CutPrefix(h, ">")
		size[i] = utf8.RuneCountInString(head[i])
		for _, row := range t.rows {
			size[i] = max(size[i], utf8.RuneCountInString(row[i]))
		}
	}
	out := bufio.NewWriter(w)
	for _, row := range append([][]string{head}, t.rows...) {
		out.WriteString(cut(line(row, size, right), width))
		out.WriteByte('\n')
	}
	return out.Flush()
}

func line(row []string, size []int, right []bool) string {
	var b strings.Builder
	for i, cell := range row {
		pad := strings.Repeat(" ", size[i]-utf8.RuneCountInString(cell))
		if i > 0 {
			b.WriteString("  ")
		}
		if right[i] {
			b.WriteString(pad + cell)
		} else {
			b.WriteString(cell + pad)
		}
	}
	return strings.TrimRight(b.String(), " ")
}

// cut shortens s to width characters; 0 means any.
func cut(s string, width int) string {
	if width < 2 || utf8.RuneCountInString(s) <= width {
		return s
	}
	return string([]rune(s)[:width-1]) + "…"
}

func (a *app) printTable(t *table) error { return t.write(a.std.Out, terminalWidth(a.std.Out)) }

// terminal returns the descriptor of w or r where it is a terminal.
func terminal(stream any) (fd int, ok bool) {
	f, isFile := stream.(*os.File)
	if !isFile {
		return 0, false
	}
	return int(f.Fd()), term.IsTerminal(int(f.Fd()))
}

func isTerminal(stream any) bool { _, ok := terminal(stream); return ok }

// terminalWidth is 0 where the stream is no terminal: lines are never cut in a pipe.
func terminalWidth(stream any) int {
	fd, ok := terminal(stream)
	if !ok {
		return 0
	}
	width, _, err := term.GetSize(fd)
	if err != nil {
		return 0
	}
	return width
}

// when writes a time: relative on a terminal, where a person reads it; RFC 3339 in a pipe, where a program does.
func (a *app) when(t *timestamppb.Timestamp) string {
	if t == nil || !t.IsValid() {
		return ""
	}
	if !isTerminal(a.std.Out) {
		return t.AsTime().UTC().Format(time.RFC3339)
	}
	return relative(time.Until(t.AsTime()))
}

func relative(d time.Duration) string {
	if d < 0 {
		return span(-d) + " ago"
	}
	return "in " + span(d)
}

// span is a duration in its largest unit, as a person would say it.
func span(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// joined is a list in one cell.
func joined(list []string) string { return strings.Join(list, ", ") }

// localOutput is where a Local function prints. What it read (events, a ledger) may quote a guest.
func (a *app) localOutput() io.Writer { return a.guestOutput(a.std.Out, true, false) }

// writeWhole writes a file whole or not at all: under another name first, then renamed. It is its owner's alone.
func writeWhole(file string, write func(io.Writer) error) error {
	f, err := os.CreateTemp(filepath.Dir(file), ".vigia-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := errors.Join(write(f), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}
