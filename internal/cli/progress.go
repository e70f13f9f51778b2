package cli

import (
	"io"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// progress shows a long call's steps: a bar for each on a terminal, nothing in a pipe.
type progress struct {
	bars *mpb.Progress
	bar  *mpb.Bar
	name string
}

func newProgress(w io.Writer) *progress {
	if !isTerminal(w) {
		return &progress{}
	}
	return &progress{bars: mpb.New(mpb.WithOutput(w), mpb.WithWidth(30))}
}

// step moves the bar of the named step, and ends the one before it.
func (p *progress) step(name string, done, total int64) {
	if p.bars == nil {
		return
	}
	if p.bar == nil || name != p.name {
		p.finish(true)
		p.name = name
		p.bar = p.newBar(name, total)
	}
	if total > 0 {
		p.bar.SetTotal(total, false)
		p.bar.SetCurrent(min(done, total))
	}
}

func (p *progress) newBar(name string, total int64) *mpb.Bar {
	label := decor.Name(cut(plain(name), 40), decor.WC{W: 42, C: decor.DindentRight})
	elapsed := decor.Elapsed(decor.ET_STYLE_GO, decor.WC{W: 8})
	if total <= 0 {
		return p.bars.AddSpinner(0, mpb.PrependDecorators(label), mpb.AppendDecorators(elapsed))
	}
	// A bar made with its total could not be completed before it is reached, and end would wait for it for ever.
	return p.bars.AddBar(0, mpb.PrependDecorators(label), mpb.AppendDecorators(decor.Percentage(decor.WC{W: 5}), elapsed))
}

// finish completes the open bar, or leaves it where it stopped.
func (p *progress) finish(ok bool) {
	switch {
	case p.bar == nil:
	case ok:
		p.bar.SetTotal(-1, true)
	default:
		p.bar.Abort(false)
	}
	p.bar = nil
}

// end finishes the last step and waits until the terminal shows it.
func (p *progress) end(ok bool) {
	if p.bars == nil {
		return
	}
	p.finish(ok)
	p.bars.Wait()
}
