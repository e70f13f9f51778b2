package image

import (
	"context"
	"os"
	"strings"
)

func joinWords(words ...string) string {
	return strings.Join(strings.Fields(strings.Join(words, " ")), " ")
}

// TODO placeholder until ImportRaw lands
func writeLayer(ctx context.Context, dst, raw *os.File, progress func(done, total int64)) error {
	_, err := dst.ReadFrom(raw)
	return err
}
