package additions

import (
	"context"
	"fmt"
)

// Freeze makes the guest write out what its file systems hold back, and let nobody write until they are thawed. It returns
// how many it says there are. Where asked is true the guest may have heard it, whatever came of it, and must be thawed; it
// hears nothing but that and questions meanwhile.
func (a *Agent) Freeze(ctx context.Context) (count int, asked bool, err error) {
	asked, err = a.asked(ctx, "guest-fsfreeze-freeze", nil, &count)
	if err == nil && count < 1 {
		err = fmt.Errorf("%w: it froze %d file systems", ErrProtocol, count)
	}
	return count, asked, err
}

// Thaw lets them be written again. One who has frozen nothing does nothing.
func (a *Agent) Thaw(ctx context.Context) error { return a.call(ctx, "guest-fsfreeze-thaw", nil, nil) }
