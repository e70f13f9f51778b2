package convert

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"vigia/internal/volume"
)

// flatten writes n layers, the lowest first, into the file that follows them.
func flatten(text string, file func(n int) *os.File) error {
	n, err := strconv.Atoi(text)
	if err != nil || n < 2 || n >= volume.MaxLayers {
		return fmt.Errorf("%q layers to merge: 2 to %d", text, volume.MaxLayers-1)
	}
	layers := make([]*os.File, n)
	for i := range layers {
		layers[i] = file(i)
	}
	return volume.Flatten(file(n), layers, nil)
}

// Flatten merges frozen layers, the lowest first, into an empty file.
func (w Worker) Flatten(ctx context.Context, layers []*os.File, dst *os.File) error {
	if len(layers) < 2 {
		return errors.New("merge layers: there are none to merge")
	}
	files := append(append([]*os.File{}, layers...), dst)
	if err := w.ask(ctx, nil, []string{"flatten", strconv.Itoa(len(layers))}, files...); err != nil {
		return fmt.Errorf("merge layers: %w", err)
	}
	return nil
}
