package ledger

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"
)

// maxHead bounds the text of a signed head.
const maxHead = 2 << 10

// headLines is the number of lines of a signed head: origin, size, root, time, blank, signature.
const headLines = 6

// Head commits to the first Size entries. Note is the signed text, from which the rest was read.
type Head struct {
	Size uint64    `json:"size"`
	Root Hash      `json:"root"`
	Time time.Time `json:"time"`
	Note string    `json:"note,omitempty"`
}

// signHead makes the signed text of a head:
//
//	vigia/0a1b2c3d
//	1234
//	q1xBb…=
//	time 2026-01-02T03:04:05.678901234Z
//
//	— vigia/0a1b2c3d Az3gru…
func signHead(s note.Signer, size uint64, root Hash, at time.Time) (Head, error) {
	at = at.UTC().Round(0)
	text := fmt.Sprintf("%s\n%d\n%s\ntime %s\n", s.Name(), size, root, at.Format(time.RFC3339Nano))
	signed, err := note.Sign(&note.Note{Text: text}, s)
	if err != nil {
		return Head{}, fmt.Errorf("sign the head of %d entries: %w", size, err)
	}
	return Head{Size: size, Root: root, Time: at, Note: string(signed)}, nil
}

// ParseHead checks a head's signature and reads it. Only the very bytes that signHead writes are accepted: a
// signature holds under a few other spellings of the same text, and a changed byte must not pass.
func ParseHead(text []byte, vkey string) (Head, error) {
	verifier, err := checkKey(vkey)
	if err != nil {
		return Head{}, err
	}
	return parseHead(text, verifier)
}

func parseHead(text []byte, verifier note.Verifier) (Head, error) {
	if len(text) > maxHead || bytes.Count(text, []byte("\n")) != headLines {
		return Head{}, fmt.Errorf("%w: not a head", ErrSignature)
	}
	n, err := note.Open(text, note.VerifierList(verifier))
	if err != nil {
		return Head{}, fmt.Errorf("%w: %v", ErrSignature, err)
	}
	h, err := parseHeadText(n.Text, verifier.Name())
	if err != nil {
		return Head{}, err
	}
	if len(n.Sigs) != 1 || canonicalNote(n) != string(text) {
		return Head{}, fmt.Errorf("%w: its text was changed", ErrSignature)
	}
	h.Note = string(text)
	return h, nil
}

func parseHeadText(text, origin string) (Head, error) {
	bad := func(what string) (Head, error) { return Head{}, fmt.Errorf("%w: bad %s", ErrSignature, what) }
	lines := strings.Split(text, "\n")
	if len(lines) != 5 || lines[0] != origin {
		return bad("origin")
	}
	size, err := strconv.ParseUint(lines[1], 10, 63)
	if err != nil || strconv.FormatUint(size, 10) != lines[1] {
		return bad("size")
	}
	h := Head{Size: size}
	if err := h.Root.UnmarshalText([]byte(lines[2])); err != nil {
		return bad("root")
	}
	stamp, ok := strings.CutPrefix(lines[3], "time ")
	h.Time, err = time.Parse(time.RFC3339Nano, stamp)
	if !ok || err != nil {
		return bad("time")
	}
	return h, nil
}

// canonicalNote writes the one form of a note with one signature.
func canonicalNote(n *note.Note) string {
	sig, err := base64.StdEncoding.DecodeString(n.Sigs[0].Base64)
	if err != nil {
		return ""
	}
	return n.Text + "\n— " + n.Sigs[0].Name + " " + base64.StdEncoding.EncodeToString(sig) + "\n"
}
