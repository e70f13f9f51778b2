package policy

import (
	"bufio"
	"bytes"
	"fmt"
	"io"

	"vigia/internal/event"
)

// RunRecorded runs rules over recorded events, one JSON object a line, in the order of the lines, and returns all
// decisions. Empty lines and lines that begin with # are skipped; any other line that is no event is an error with its
// number.
func RunRecorded(rules []Rule, events io.Reader) ([]Decision, error) {
	engine := NewEngine(rules)
	lines := bufio.NewScanner(events)
	lines.Buffer(make([]byte, 0, 64<<10), event.MaxEvent+1)
	var decisions []Decision
	n := 0
	for lines.Scan() {
		n++
		line := bytes.TrimSpace(lines.Bytes())
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		e, err := event.Unmarshal(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		decisions = append(decisions, engine.Event(e)...)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("line %d: %w", n+1, err)
	}
	return decisions, nil
}
