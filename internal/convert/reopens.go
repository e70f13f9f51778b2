package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"vigia/internal/inventory"
	"vigia/internal/inventory/scan"
	"vigia/internal/volume"
	"vigia/internal/volume/ext4"
)

// comparison is the question what a rollback reopens: how many of the files, in order, are the layers of the checkpoint's
// disk and of the present one, and whether a file of vulnerabilities follows.
type comparison struct {
	Then  int             `json:"then"`
	Now   int             `json:"now"`
	Holes bool            `json:"holes"`
	Ports inventory.Ports `json:"ports"`
	At    time.Time       `json:"at"`
}

// reopens answers it.
func reopens(text string, file func(n int) *os.File) ([]inventory.Item, error) {
	var q comparison
	if err := json.Unmarshal([]byte(text), &q); err != nil {
		return nil, err
	}
	if q.Then < 1 || q.Now < 1 || q.Then+q.Now > 2*volume.MaxLayers {
		return nil, fmt.Errorf("reopens: %d and %d layers", q.Then, q.Now)
	}
	then, err := scanDisk(q.Then, file)
	if err != nil {
		return nil, fmt.Errorf("the checkpoint's disk: %w", err)
	}
	now, err := scanDisk(q.Now, func(n int) *os.File { return file(q.Then + n) })
	if err != nil {
		return nil, fmt.Errorf("the present disk: %w", err)
	}
	var holes *inventory.Holes
	if q.Holes {
		codename, number := debian(now.Release)
		if holes, err = inventory.ReadHoles(file(q.Then+q.Now), codename, number); err != nil {
			return nil, err
		}
	}
	return inventory.Reopens(now, then, q.Ports, q.At, holes), nil
}

// scanDisk reads the root file system of a frozen chain of n layers, the lowest first.
func scanDisk(n int, layer func(n int) *os.File) (scan.State, error) {
	layers := make([]*os.File, n)
	for i := range layers {
		layers[i] = layer(i)
	}
	v, err := volume.Open(layers, nil, volume.Options{})
	if err != nil {
		return scan.State{}, err
	}
	defer v.Close()
	list, err := ext4.Find(v, v.Size())
	if err != nil && !errors.Is(err, ext4.ErrPartitions) {
		return scan.State{}, err
	}
	for _, at := range list {
		if !at.Named() {
			continue
		}
		fsys, err := ext4.Open(v, at.Offset, at.Size)
		if err != nil {
			return scan.State{}, err
		}
		if _, err := fsys.Stat("/etc/passwd"); err == nil {
			return scan.Read(fsys)
		}
	}
	return scan.State{}, errors.New("no ext4 file system with an /etc/passwd: what this machine's disk holds can't be told")
}

// releases are the names that vulnerability files have for what os-release says.
var releases = map[string]string{"11": "bullseye", "12": "bookworm", "13": "trixie", "14": "forky"}

// debian finds the release's number in a name like "Debian GNU/Linux 12 (bookworm)".
func debian(pretty string) (codename, number string) {
	var n int
	if _, err := fmt.Sscanf(pretty, "Debian GNU/Linux %d", &n); err != nil {
		return "", ""
	}
	number = fmt.Sprint(n)
	return releases[number], number
}

// Reopens lists what a machine whose disk is now gets back when then takes its place. Both are frozen layers, the lowest
// first. holes may be nil: the JSON of Debian's security tracker, or of OSV.
func (w Worker) Reopens(ctx context.Context, then, now []*os.File, ports inventory.Ports, holes *os.File) (items []inventory.Item, err error) {
	q, err := json.Marshal(comparison{Then: len(then), Now: len(now), Holes: holes != nil, Ports: ports, At: time.Now()})
	if err != nil {
		return nil, err
	}
	files := append(append([]*os.File{}, then...), now...)
	if holes != nil {
		if _, err := holes.Seek(0, io.SeekStart); err != nil {
			return nil, err
		}
		files = append(files, holes)
	}
	err = w.ask(ctx, &items, []string{"reopens", string(q)}, files...)
	return items, err
}
