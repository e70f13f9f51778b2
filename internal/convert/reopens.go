package convert

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"

	"vigia/internal/inventory"
	"vigia/internal/inventory/scan"
	"vigia/internal/volume"
)

// comparison is the question what a rollback reopens: how many of the files, in order, are the layers of the checkpoint's
// disk and of the present one, and whether a file of vulnerabilities follows.
type comparison struct {
	Then    int       `json:"then"`
	Now     int       `json:"now"`
	Overlay bool      `json:"overlay"` // the last of now is an overlay, which opening may put in order
	Holes   bool      `json:"holes"`
	At      time.Time `json:"at"`
}

func (q *comparison) check() error {
	if q.Then < 1 || q.Now < 1 || q.Then > volume.MaxLayers || q.Now > volume.MaxLayers {
		return fmt.Errorf("two disks of %d and %d layers: each has 1 to %d", q.Then, q.Now, volume.MaxLayers)
	}
	return nil
}

// reopens answers it.
func reopens(text string, file func(n int) *os.File) ([]inventory.Item, error) {
	var q comparison
	if err := json.Unmarshal([]byte(text), &q); err != nil {
		return nil, err
	}
	if err := q.check(); err != nil {
		return nil, err
	}
	then, err := scanDisk(q.Then, false, file)
	if err != nil {
		return nil, fmt.Errorf("the checkpoint's disk: %w", err)
	}
	now, err := scanDisk(q.Now, q.Overlay, func(n int) *os.File { return file(q.Then + n) })
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
	return inventory.Reopens(now, then, inventory.Ports{}, q.At, holes), nil
}

// openDisk opens a chain of n layers, the lowest first, all frozen but for an overlay on top.
func openDisk(n int, overlay bool, layer func(n int) *os.File) (*volume.Volume, error) {
	layers := make([]*os.File, n)
	for i := range layers {
		layers[i] = layer(i)
	}
	var top *os.File
	if overlay {
		layers, top = layers[:n-1], layers[n-1]
	}
	return volume.Open(layers, top, volume.Options{})
}

// scanDisk reads the root file system of a chain.
func scanDisk(n int, overlay bool, layer func(n int) *os.File) (scan.State, error) {
	v, err := openDisk(n, overlay, layer)
	if err != nil {
		return scan.State{}, err
	}
	defer v.Close()
	fsys, err := rootOf(v)
	if err != nil {
		return scan.State{}, err
	}
	return scan.Read(fsys)
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

// Disks are what Reopens compares: chains of frozen layers, the lowest first.
type Disks struct {
	Then, Now []*os.File
	Overlay   *os.File // on top of Now, open for reading and writing; nil where there is none
	Holes     *os.File // the JSON of Debian's security tracker, or of OSV; may be nil
}

// Reopens lists what a machine whose disk is Now gets back when Then takes its place.
func (w Worker) Reopens(ctx context.Context, d Disks) (items []inventory.Item, err error) {
	q := comparison{Then: len(d.Then), Now: len(d.Now), Holes: d.Holes != nil, At: time.Now()}
	files := slices.Concat(d.Then, d.Now)
	if d.Overlay != nil {
		q.Overlay, q.Now, files = true, q.Now+1, append(files, d.Overlay)
	}
	if d.Holes != nil {
		files = append(files, d.Holes)
	}
	text, err := json.Marshal(q)
	if err != nil {
		return nil, err
	}
	err = w.ask(ctx, &items, []string{"reopens", string(text)}, files...)
	return items, err
}
