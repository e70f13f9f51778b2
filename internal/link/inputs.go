package link

import "time"

// KeepInputs comes with the files of a log, in their order.
type KeepInputs struct {
	Run   time.Time     `json:"run"` // when the machine's run began
	Bytes int64         `json:"bytes"`
	Age   time.Duration `json:"age"`
}

// Play comes with the files of two logs, for reading: so many of a gate's, then so many of a guard's.
type Play struct {
	Gate  int           `json:"gate"`
	Guard int           `json:"guard"`
	From  time.Time     `json:"from"` // the instant of the checkpoint
	Wait  time.Duration `json:"wait"` // what a wait in which nothing entered is cut to; 0: as it was
}

// Played is what was given.
type Played struct {
	FlowsIn    int       `json:"flows_in"`
	FlowsOut   int       `json:"flows_out"`
	Names      int       `json:"names"`
	Typed      int64     `json:"typed"`
	Calls      int       `json:"calls"`
	Bytes      int64     `json:"bytes"`
	Late       int       `json:"late"`
	Refused    int       `json:"refused"`
	Unasked    int       `json:"unasked"`
	Older      int       `json:"older"`
	OlderBytes int64     `json:"older_bytes"`
	Until      time.Time `json:"until"`
	Gaps       []string  `json:"gaps"`
}
