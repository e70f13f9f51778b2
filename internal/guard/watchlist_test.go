package guard

import (
	"slices"
	"testing"
)

func TestWatchlistDropsWhatIsNotMeant(t *testing.T) {
	w := newWatchlist([]string{"/etc/shadow", "/etc/ssh/ssh_host_**", "**/.ssh/id_**", "/etc/cron**", "/etc/pam.d/**"})
	for path, want := range map[string]bool{
		"/etc/shadow": true, "/etc/shadow-": false, "/etc/passwd": false,
		"/etc/ssh/ssh_host_rsa_key": true, "/etc/ssh/sshd_config": false,
		"/root/.ssh/id_ed25519": true, "/home/ana/.ssh/id_rsa": true, "/home/ana/id_rsa": false,
		"/etc/cron.d/x": true, "/etc/crontab": true, "/etc/pam.d/su": true, "/etc/pam.d": false,
	} {
		if _, got := w.meant(path); got != want {
			t.Errorf("%s: %v", path, got)
		}
	}
	if p, ok := w.meant("/tmp/x", "/etc/shadow"); !ok || p != "/etc/shadow" {
		t.Errorf("a hard link hides a watched path: %q", p)
	}
	want := []string{"/etc/**", "/etc/pam.d/**", "/etc/shadow", "/etc/ssh/**", "/home/**", "/root/**"}
	if got := w.followed(); !slices.Equal(got, want) {
		t.Errorf("followed: %v", got)
	}
}
