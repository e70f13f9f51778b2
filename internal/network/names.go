package network

import (
	"net/netip"
	"strconv"
	"sync"
	"time"

	"vigia/internal/vm"
)

func utoa(v uint16) string { return strconv.Itoa(int(v)) }

// nameTable remembers under which name the guest learned an address, for rules by name and for reports. Only the
// name the guest asked for counts, not those on the way to its address.
type nameTable struct {
	mu    sync.Mutex
	max   int
	addrs map[netip.Addr][]binding
	count int
	rules []string // names that rules speak of
}

type binding struct {
	name  string
	until time.Time
	ruled bool // a rule speaks of it
}

// A name holds for as long as its record says, within these bounds: programs keep addresses longer than they should.
const (
	nameAtLeast    = 5 * time.Minute
	nameAtMost     = 24 * time.Hour
	namesOfAddress = 8
)

func newNameTable(max int) *nameTable {
	return &nameTable{max: max, addrs: map[netip.Addr][]binding{}}
}

func (t *nameTable) setRuled(rules []vm.NetRule) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rules = nil
	for _, r := range rules {
		if r.Name != "" {
			t.rules = append(t.rules, r.Name)
		}
	}
}

// learn notes that name had the address a for ttl.
func (t *nameTable) learn(name string, a netip.Addr, ttl time.Duration, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	b := binding{name: name, until: now.Add(min(max(ttl, nameAtLeast), nameAtMost))}
	for _, r := range t.rules {
		b.ruled = b.ruled || nameMatches(r, name)
	}
	list := t.addrs[a]
	for i := range list {
		if list[i].name == name {
			list[i] = b
			list[i], list[len(list)-1] = list[len(list)-1], list[i] // the last is the newest
			return
		}
	}
	if len(list) >= namesOfAddress {
		t.dropOne(a)
	} else if t.count >= t.max {
		t.makeRoom(now)
	}
	if t.count >= t.max {
		return
	}
	t.addrs[a] = append(t.addrs[a], b)
	t.count++
}

// makeRoom drops all that has run out among a few addresses, or else one binding that no rule speaks of: a flood of names must not
// make a rule forget its own.
func (t *nameTable) makeRoom(now time.Time) {
	looked := 0
	var victim netip.Addr
	for a, list := range t.addrs {
		for _, b := range list {
			if now.After(b.until) || !b.ruled {
				victim = a
			}
			if now.After(b.until) {
				looked = 64
			}
		}
		if looked++; looked >= 64 && victim.IsValid() {
			break
		}
	}
	if victim.IsValid() {
		t.dropOne(victim)
	}
}

// dropOne drops an address's oldest binding, one without a rule if there is such.
func (t *nameTable) dropOne(a netip.Addr) {
	list := t.addrs[a]
	at := 0
	for i, b := range list {
		if !b.ruled {
			at = i
			break
		}
	}
	list = append(list[:at], list[at+1:]...)
	t.count--
	if len(list) == 0 {
		delete(t.addrs, a)
	} else {
		t.addrs[a] = list
	}
}

// has reports whether the guest knows a under a name that the rule's covers.
func (t *nameTable) has(rule string, a netip.Addr, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, b := range t.addrs[a] {
		if now.Before(b.until) && nameMatches(rule, b.name) {
			return true
		}
	}
	return false
}

// nameOf returns the name under which the guest last learned a.
func (t *nameTable) nameOf(a netip.Addr, now time.Time) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := t.addrs[a]
	for i := len(list) - 1; i >= 0; i-- {
		if now.Before(list[i].until) {
			return list[i].name
		}
	}
	return ""
}
