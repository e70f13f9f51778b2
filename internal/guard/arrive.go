package guard

import (
	"context"

	"vigia/internal/link"
)

// arrive helps a guest that goes on from a checkpoint into its new now, by what its agent does for it.
func (g *Guard) arrive(ctx context.Context, r link.Request) (link.Response, error) {
	closeFiles(r.Files)
	var a link.Arrive
	if err := r.Decode(&a); err != nil {
		return link.Response{}, err
	}
	var told link.Arrived
	if a.Frozen && g.agent != nil { // it was saved with its file systems held still, and nobody there knows that time has passed
		told.Thawed = thaw(ctx, g.agent, thawTimes, thawWait) == nil
	}
	return link.Response{Body: told}, nil
}
