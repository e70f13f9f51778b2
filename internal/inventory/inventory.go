// Package inventory answers for what a machine holds and what taking it back in time would bring back.
//
// A rollback undoes an attack, and with it whatever was mended since the checkpoint: the account that was locked is open
// again, the leaked key fits again, the package with the hole is back. Reopens compares what package scan read of the two
// disks, now and then, and lists that, worst first.
//
//	items := inventory.Reopens(now, then, time, holes)
//
// It compares facts and decides nothing: a rule may refuse a rollback for what is in the list.
//
// Debian's order of versions is that of deb-version(7), by a library.
package inventory

import (
	"cmp"
	"slices"
	"time"

	"vigia/internal/inventory/scan"
)

// Severity of an item, in the words of the rules.
type Severity string

// The severities, and how they are ordered.
const (
	Info     Severity = "info"
	Low      Severity = "low"
	Medium   Severity = "medium"
	High     Severity = "high"
	Critical Severity = "critical"
)

var rank = map[Severity]int{Info: 0, Low: 1, Medium: 2, High: 3, Critical: 4}

// AtLeast reports whether s is as bad as t, or worse. An unknown word is worst.
func (s Severity) AtLeast(t Severity) bool {
	n, ok := rank[s]
	return !ok || n >= rank[t]
}

// Item is one thing that a rollback would bring back.
type Item struct {
	Kind     string   `json:"kind"`    // account.enabled, key.returns, …: doc/reopens.md lists them
	Subject  string   `json:"subject"` // the account, package, file, … that it is about
	Detail   string   `json:"detail"`
	Severity Severity `json:"severity"`
}

// MaxItems bounds a list; what is cut off is the least severe, and its number is the last item.
const MaxItems = 2000

// Ports are the sockets that listen, as seen in the memory of the two states: "tcp 0.0.0.0:22 (sshd)". Where one was not
// looked at, both are nil.
type Ports struct{ Now, Then []string }

// Reopens lists what a machine gets back when the state then takes the place of the state now. at is the time that
// certificates are judged by. holes may be nil.
func Reopens(now, then scan.State, ports Ports, at time.Time, holes *Holes) []Item {
	c := comparison{at: at}
	c.accounts(now.Accounts, then.Accounts)
	c.lines(now.Sudo, then.Sudo, "sudo.returns", High, "sudo grants again what had been taken away")
	c.keys(now.Keys, then.Keys)
	c.packages(now.Packages, then.Packages, holes)
	c.services(now.Services, then.Services)
	c.privileged(now.Privileged, then.Privileged)
	c.hostKeys(now.HostKeys, then.HostKeys)
	c.certificates(now.Certificates, then.Certificates)
	c.lines(then.Firewall, now.Firewall, "firewall.lost", Medium, "a line of the firewall's rules is gone again")
	c.lines(now.Firewall, then.Firewall, "firewall.returns", Low, "a line of the firewall's rules that was taken out is back")
	c.ports(ports)
	c.unseen(now, then)
	return c.sorted()
}

type comparison struct {
	at    time.Time
	items []Item
}

func (c *comparison) add(kind, subject string, s Severity, detail string) {
	c.items = append(c.items, Item{kind, subject, detail, s})
}

// sorted puts the worst first, and cuts the list.
func (c *comparison) sorted() []Item {
	slices.SortStableFunc(c.items, func(a, b Item) int {
		return cmp.Or(-cmp.Compare(rank[a.Severity], rank[b.Severity]), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Subject, b.Subject))
	})
	if over := len(c.items) - MaxItems; over > 0 {
		return append(c.items[:MaxItems:MaxItems], Item{"list.cut", "", plural(over, "more thing") + " left out, none worse than these", c.items[MaxItems].Severity})
	}
	return c.items
}

// unseen tells that a list may lack something because a disk could not be read whole: silence would look like safety.
func (c *comparison) unseen(now, then scan.State) {
	for _, s := range []struct {
		which string
		notes []string
	}{{"the checkpoint's disk", then.Notes}, {"the present disk", now.Notes}} {
		for _, n := range s.notes {
			c.add("unread", s.which, Low, n)
		}
	}
}

// byKey indexes a list; of several with one key the last stands.
func byKey[K comparable, T any](list []T, key func(T) K) map[K]T {
	m := make(map[K]T, len(list))
	for _, v := range list {
		m[key(v)] = v
	}
	return m
}
