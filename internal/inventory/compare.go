package inventory

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"vigia/internal/inventory/scan"
)

func plural(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return fmt.Sprintf("%d %ss", n, word)
}

func day(t time.Time) string {
	if t.IsZero() {
		return "an unknown day"
	}
	return t.Format(time.DateOnly)
}

// privilegedGroups give root, or as good as root, to who is in them (Debian's wiki, "SystemGroups").
var privilegedGroups = []string{"root", "sudo", "wheel", "admin", "adm", "docker", "lxd", "disk", "shadow", "kmem", "libvirt"}

func (c *comparison) accounts(now, then []scan.Account) {
	have := byKey(now, func(a scan.Account) string { return a.Name })
	for _, old := range then {
		cur, there := have[old.Name]
		c.login(old, cur, there)
		for _, g := range old.Groups {
			if slices.Contains(privilegedGroups, g) && !(there && slices.Contains(cur.Groups, g)) {
				c.add("account.group", old.Name, High, "is in the group "+g+" again")
			}
		}
		if there && old.UID == 0 && cur.UID != 0 {
			c.add("account.root", old.Name, Critical, "has user id 0 again")
		}
	}
}

// login compares how an account can be entered.
func (c *comparison) login(old, cur scan.Account, there bool) {
	opens := old.Password != scan.PasswordLocked && old.Login() && !expired(old, c.at)
	opened := there && cur.Password != scan.PasswordLocked && cur.Login() && !expired(cur, c.at)
	switch {
	case opens && !opened:
		why := "had been locked"
		if !there {
			why = "had been removed"
		} else if !cur.Login() || expired(cur, c.at) {
			why = "had been closed"
		}
		sev := High
		if old.UID == 0 || old.Password == scan.PasswordNone {
			sev = Critical
		}
		c.add("account.enabled", old.Name, sev, "can log in by password again: it "+why)
	case opens && old.Password == scan.PasswordNone && cur.Password != scan.PasswordNone:
		c.add("account.password", old.Name, Critical, "needs no password again")
	case opens && old.Print != cur.Print:
		sev := Medium
		if old.UID == 0 {
			sev = High
		}
		c.add("account.password", old.Name, sev, fmt.Sprintf("has its password of %s again; it was changed on %s", day(old.Changed), day(cur.Changed)))
	}
	if !there && !opens && old.Login() {
		c.add("account.returns", old.Name, Low, "is there again; it can't log in by password")
	}
}

func expired(a scan.Account, at time.Time) bool { return !a.Expires.IsZero() && a.Expires.Before(at) }

func (c *comparison) keys(now, then []scan.Key) {
	type id struct{ user, print string }
	of := func(k scan.Key) id { return id{k.User, k.Print} }
	have := byKey(now, of)
	for _, k := range then {
		if _, there := have[of(k)]; !there {
			c.add("key.returns", k.User, High, fmt.Sprintf("opens to the key %s again (%s %s)", k.Print, k.Type, k.Comment))
		}
	}
}

func (c *comparison) hostKeys(now, then []scan.Key) {
	have := byKey(now, func(k scan.Key) string { return k.Type })
	for _, k := range then {
		if cur, there := have[k.Type]; there && cur.Print != k.Print {
			c.add("hostkey.older", k.File, Medium, "is the key that had been replaced: "+k.Print+"; if it was replaced because it leaked, others can pass for this machine")
		}
	}
}

func (c *comparison) services(now, then []scan.Service) {
	for _, s := range then {
		if !slices.Contains(now, s) {
			c.add("service.returns", s.Unit, Medium, "starts by itself again (for "+s.Target+")")
		}
	}
}

func (c *comparison) privileged(now, then []scan.File) {
	have := byKey(now, func(f scan.File) string { return f.Path })
	for _, f := range then {
		cur, there := have[f.Path]
		if there && cur == f {
			continue
		}
		sev, who := Medium, fmt.Sprintf("user %d", f.UID)
		if strings.HasPrefix(f.Mode, "g") {
			who = fmt.Sprintf("group %d", f.GID)
		} else if f.UID == 0 {
			sev, who = High, "root"
		}
		c.add("setuid.returns", f.Path, sev, "runs with the rights of "+who+" again ("+f.Mode+")")
	}
}

func (c *comparison) certificates(now, then []scan.Certificate) {
	have := byKey(now, func(x scan.Certificate) string { return x.File })
	for _, x := range then {
		cur, there := have[x.File]
		if there && cur.Print == x.Print {
			continue
		}
		switch {
		case x.NotAfter.Before(c.at):
			c.add("certificate.expired", x.File, Medium, fmt.Sprintf("is the certificate of %s that expired on %s", x.Subject, day(x.NotAfter)))
		case there:
			c.add("certificate.older", x.File, Low, "is the certificate of "+x.Subject+" that had been replaced")
		}
	}
}

// lines adds what is in then and not in now.
func (c *comparison) lines(now, then []scan.Line, kind string, s Severity, detail string) {
	have := byKey(now, func(l scan.Line) scan.Line { return l })
	for _, l := range then {
		if _, there := have[l]; !there {
			c.add(kind, l.File, s, detail+": "+l.Text)
		}
	}
}

func (c *comparison) ports(p Ports) {
	for _, s := range p.Then {
		if !slices.Contains(p.Now, s) {
			c.add("port.opens", s, Medium, "listens again")
		}
	}
}
