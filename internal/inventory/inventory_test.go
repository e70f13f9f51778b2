package inventory

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"vigia/internal/inventory/scan"
)

var at = time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)

// find returns the items about a subject, as "kind severity".
func find(items []Item, subject string) (list []string) {
	for _, i := range items {
		if i.Subject == subject {
			list = append(list, i.Kind+" "+string(i.Severity))
		}
	}
	slices.Sort(list)
	return list
}

// TestWhatAMendedMachineGetsBack plays an administrator who cleaned up after an intruder, and then rolls back.
func TestWhatAMendedMachineGetsBack(t *testing.T) {
	shell := "/bin/bash"
	then := scan.State{
		Accounts: []scan.Account{
			{Name: "root", Shell: shell, Password: scan.PasswordSet, Print: "old"},
			{Name: "eve", UID: 1001, Shell: shell, Password: scan.PasswordSet, Print: "e", Groups: []string{"sudo", "users"}},
			{Name: "leaver", UID: 1002, Shell: shell, Password: scan.PasswordSet, Print: "l"},
			{Name: "open", UID: 1003, Shell: shell, Password: scan.PasswordNone},
			{Name: "same", UID: 1004, Shell: shell, Password: scan.PasswordSet, Print: "s"},
			{Name: "service", UID: 100, Shell: "/usr/sbin/nologin", Password: scan.PasswordLocked},
			{Name: "past", UID: 1005, Shell: shell, Password: scan.PasswordSet, Print: "p", Expires: at.AddDate(0, 0, -1)},
		},
		Sudo:         []scan.Line{{File: "/etc/sudoers.d/eve", Text: "eve ALL=(ALL) NOPASSWD: ALL"}, {File: "/etc/sudoers", Text: "root ALL=(ALL) ALL"}},
		Keys:         []scan.Key{{User: "root", Print: "SHA256:leaked"}, {User: "root", Print: "SHA256:mine"}},
		HostKeys:     []scan.Key{{File: "/etc/ssh/ssh_host_rsa_key.pub", Type: "ssh-rsa", Print: "SHA256:a"}},
		Packages:     []scan.Package{{Name: "libssl3", Arch: "amd64", Version: "3.0.11-1", Source: "openssl", SourceVersion: "3.0.11-1"}, {Name: "telnetd", Arch: "amd64", Version: "1", Source: "netkit", SourceVersion: "1"}, {Name: "newer", Arch: "amd64", Version: "2", Source: "newer", SourceVersion: "2"}},
		Services:     []scan.Service{{Unit: "telnet.socket", Target: "sockets.target"}},
		Privileged:   []scan.File{{Path: "/tmp/.x", Mode: "urwxr-xr-x"}, {Path: "/usr/bin/su", Mode: "urwxr-xr-x"}},
		Certificates: []scan.Certificate{{File: "/etc/letsencrypt/live/web/cert.pem", Subject: "CN=web", Print: "1", NotAfter: at.AddDate(0, -1, 0)}},
		Firewall:     []scan.Line{{File: "/etc/nftables.conf", Text: "tcp dport 22 accept"}},
	}
	now := scan.State{
		Accounts: []scan.Account{
			{Name: "root", Shell: shell, Password: scan.PasswordSet, Print: "new"},
			{Name: "eve", UID: 1001, Shell: shell, Password: scan.PasswordLocked, Print: "e"},
			{Name: "open", UID: 1003, Shell: shell, Password: scan.PasswordSet, Print: "o"},
			{Name: "same", UID: 1004, Shell: shell, Password: scan.PasswordSet, Print: "s"},
			{Name: "past", UID: 1005, Shell: shell, Password: scan.PasswordLocked, Print: "p"},
		},
		Sudo:         []scan.Line{{File: "/etc/sudoers", Text: "root ALL=(ALL) ALL"}},
		Keys:         []scan.Key{{User: "root", Print: "SHA256:mine"}},
		HostKeys:     []scan.Key{{File: "/etc/ssh/ssh_host_rsa_key.pub", Type: "ssh-rsa", Print: "SHA256:b"}},
		Packages:     []scan.Package{{Name: "libssl3", Arch: "amd64", Version: "3.0.15-1~deb12u1", Source: "openssl", SourceVersion: "3.0.15-1~deb12u1"}, {Name: "newer", Arch: "amd64", Version: "1", Source: "newer", SourceVersion: "1"}},
		Privileged:   []scan.File{{Path: "/usr/bin/su", Mode: "urwxr-xr-x"}},
		Certificates: []scan.Certificate{{File: "/etc/letsencrypt/live/web/cert.pem", Subject: "CN=web", Print: "2", NotAfter: at.AddDate(0, 2, 0)}},
		Firewall:     []scan.Line{{File: "/etc/nftables.conf", Text: "tcp dport 22 accept"}, {File: "/etc/nftables.conf", Text: "ip saddr 203.0.113.9 drop"}},
	}
	holes, err := ReadHoles(strings.NewReader(trackerJSON), "bookworm", "12")
	if err != nil {
		t.Fatal(err)
	}
	items := Reopens(now, then, Ports{Now: []string{"tcp *:22 (sshd)"}, Then: []string{"tcp *:22 (sshd)", "tcp *:23 (inetd)"}}, at, holes)
	for subject, want := range map[string][]string{
		"root":                               {"account.password high", "key.returns high"},
		"eve":                                {"account.enabled high", "account.group high"},
		"leaver":                             {"account.enabled high"},
		"open":                               {"account.password critical"},
		"same":                               nil,
		"past":                               nil,
		"newer":                              nil,
		"/etc/sudoers":                       nil,
		"/etc/sudoers.d/eve":                 {"sudo.returns high"},
		"libssl3":                            {"package.older low", "vulnerability.returns high"},
		"telnetd":                            {"package.returns low"},
		"telnet.socket":                      {"service.returns medium"},
		"/tmp/.x":                            {"setuid.returns high"},
		"/usr/bin/su":                        nil,
		"/etc/ssh/ssh_host_rsa_key.pub":      {"hostkey.older medium"},
		"/etc/letsencrypt/live/web/cert.pem": {"certificate.expired medium"},
		"/etc/nftables.conf":                 {"firewall.lost medium"},
		"tcp *:23 (inetd)":                   {"port.opens medium"},
		"tcp *:22 (sshd)":                    nil,
	} {
		if got := find(items, subject); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", subject, got, want)
		}
	}
	if !slices.IsSortedFunc(items, func(a, b Item) int { return rank[b.Severity] - rank[a.Severity] }) {
		t.Error("the worst does not stand first")
	}
	if again := Reopens(then, then, Ports{}, at, holes); len(again) != 0 {
		t.Errorf("a state against itself: %+v", again)
	}
}

const trackerJSON = `{"openssl": {"CVE-2024-1": {"releases": {"bookworm": {"status": "resolved", "fixed_version": "3.0.14-1", "urgency": "high**"}}},
 "CVE-2020-1": {"releases": {"bookworm": {"status": "resolved", "fixed_version": "1.1-1", "urgency": "low"}}},
 "CVE-2024-9": {"releases": {"trixie": {"status": "resolved", "fixed_version": "9", "urgency": "low"}}},
 "CVE-2024-8": {"releases": {"bookworm": {"status": "open"}}}}, "unrelated": {"TEMP-1": {"releases": {}}}}`

func TestBothFormsOfVulnerabilityFile(t *testing.T) {
	record := `{"id":"DSA-1","schema_version":"1.6.0","aliases":["CVE-2024-1"],"affected":[{"package":{"ecosystem":"Debian:12","name":"openssl"},"ranges":[{"type":"ECOSYSTEM","events":[{"introduced":"0"},{"fixed":"3.0.14-1"}]}]}]}`
	for name, text := range map[string]string{"one record": record, "a list": "[" + record + `,{"id":"x"}]`} {
		h, err := ReadHoles(strings.NewReader(text), "bookworm", "12")
		if err != nil || h.Len() != 1 || h.by["openssl"][0].id != "CVE-2024-1" {
			t.Errorf("%s: %+v, %v", name, h, err)
		}
	}
	for _, text := range []string{"", "7", "null", "{\"a\":", "[1]", "<html>"} {
		if _, err := ReadHoles(strings.NewReader(text), "bookworm", "12"); !errors.Is(err, ErrHoles) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// TestAnUnreadableDiskIsNotAClean one: what could not be read is in the list.
func TestWhatWasNotReadIsInTheList(t *testing.T) {
	items := Reopens(scan.State{}, scan.State{Notes: []string{"/etc/shadow: corrupt"}}, Ports{}, at, nil)
	if len(items) != 1 || items[0].Kind != "unread" || !items[0].Severity.AtLeast(Low) {
		t.Errorf("%+v", items)
	}
}

func TestALongListIsCutAtItsEnd(t *testing.T) {
	var then scan.State
	for i := range MaxItems + 10 {
		then.Packages = append(then.Packages, scan.Package{Name: strings.Repeat("p", i%200+1) + string(rune('a'+i/200)), Version: "1"})
	}
	then.Keys = []scan.Key{{User: "root", Print: "SHA256:x"}}
	items := Reopens(scan.State{}, then, Ports{}, at, nil)
	if len(items) != MaxItems+1 || items[0].Kind != "key.returns" || items[MaxItems].Kind != "list.cut" {
		t.Errorf("%d items, first %+v, last %+v", len(items), items[0], items[len(items)-1])
	}
}

func FuzzReadHoles(f *testing.F) {
	f.Add([]byte(trackerJSON))
	f.Add([]byte(`[{"id":"a","affected":[{"package":{"ecosystem":"Debian:12","name":"x"},"ranges":[{"events":[{"fixed":"1"}]}]}]}]`))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ReadHoles(strings.NewReader(string(b)), "bookworm", "12")
		if err == nil {
			h.reopened(scan.Package{Source: "x", SourceVersion: "0"}, scan.Package{}, false)
		}
	})
}
