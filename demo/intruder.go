package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// intruder is somebody on the network with a list of passwords.
type intruder struct {
	ssh *ssh.Client
	loggedIn,
	stole,
	cracking time.Time

	beatMu   sync.Mutex
	lastBeat time.Time
	dead     chan error // the end of the session that was open
}

func (i *intruder) close() {
	if i.ssh != nil {
		i.ssh.Close()
	}
}

// answer waits for the ssh server's banner: the machine has booted.
func (s *stage) answer(ctx context.Context) error {
	for ctx.Err() == nil {
		if banner := sshBanner(ctx, s.port); banner != "" {
			s.progress("%s", banner)
			return nil
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

func sshBanner(ctx context.Context, port string) string {
	d := net.Dialer{Timeout: 2 * time.Second}
	c, err := d.DialContext(ctx, "tcp", "127.0.0.1:"+port)
	if err != nil {
		return ""
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	buf := make([]byte, 64)
	n, _ := c.Read(buf)
	line, _, _ := strings.Cut(string(buf[:n]), "\r\n")
	if !strings.HasPrefix(line, "SSH-") {
		return ""
	}
	return line
}

// logIn tries a few passwords, as a dictionary attack does, and keeps one session open: its heartbeat shows the
// connection's life.
func (s *stage) logIn(ctx context.Context) error {
	for _, guess := range []string{"123456", "password", password} {
		client, err := ssh.Dial("tcp", "127.0.0.1:"+s.port, &ssh.ClientConfig{User: user, Auth: []ssh.AuthMethod{ssh.Password(guess)},
			HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: time.Minute}) // an intruder does not care who answers
		if err == nil {
			s.ssh = client
			break
		}
		if !strings.Contains(err.Error(), "unable to authenticate") {
			return err
		}
	}
	if s.ssh == nil {
		return errors.New("no password worked")
	}
	s.loggedIn = time.Now()
	out, err := s.shell("id; uname -sr")
	if err != nil {
		return err
	}
	s.progress("%s:%s · %s", user, password, strings.Join(strings.Fields(out), " "))
	return s.heartbeat()
}

// shell runs a command in the machine over ssh.
func (s *stage) shell(command string) (string, error) {
	session, err := s.ssh.NewSession()
	if err != nil {
		return "", err
	}
	defer session.Close()
	var out, errs bytes.Buffer
	session.Stdout, session.Stderr = &out, &errs
	if err := session.Run(command); err != nil {
		return out.String(), fmt.Errorf("%q in the machine: %w: %s", command, err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

func (s *stage) heartbeat() error {
	session, err := s.ssh.NewSession()
	if err != nil {
		return err
	}
	out, err := session.StdoutPipe()
	if err != nil {
		return err
	}
	if err := session.Start("while sleep 0.5; do echo beat; done"); err != nil {
		return err
	}
	s.dead = make(chan error, 1)
	go func() {
		buf := make([]byte, 256)
		for {
			_, err := out.Read(buf)
			if err != nil {
				s.dead <- err
				return
			}
			s.beatMu.Lock()
			s.lastBeat = time.Now()
			s.beatMu.Unlock()
		}
	}()
	return nil
}

// takePasswords copies the password files. The disk is read where the page cache does not have them yet: login itself
// has already read /etc/shadow, and vigia has seen that too.
func (s *stage) takePasswords(context.Context) error {
	out, err := s.shell("echo " + password + " | sudo -S -p '' sh -c 'cat /etc/shadow /etc/gshadow > /tmp/.loot; chmod 644 /tmp/.loot; wc -l < /tmp/.loot; grep -c \"[$]\" /tmp/.loot'")
	if err != nil {
		return err
	}
	s.stole = time.Now()
	n := strings.Fields(out)
	if len(n) != 2 || n[1] == "0" {
		return fmt.Errorf("no password hashes in the loot: %q", out)
	}
	s.progress("%s lines, %s with password hashes", n[0], n[1])
	return nil
}

// startJohn runs the real john; it stays when the session goes.
func (s *stage) startJohn(context.Context) error {
	if _, err := s.shell("nohup /usr/sbin/john --session=/tmp/.j --format=crypt /tmp/.loot > /tmp/.john 2>&1 < /dev/null & sleep 3; pgrep -x john"); err != nil {
		return err
	}
	s.cracking = time.Now()
	return nil
}

// connectionDead checks both the open session and a new connection.
func (s *stage) connectionDead(ctx context.Context) error {
	select {
	case err := <-s.dead:
		if !errors.Is(err, io.EOF) {
			return fmt.Errorf("the session ended in another way: %w", err)
		}
	case <-time.After(5 * time.Second):
		return errors.New("the session still lives five seconds after the quarantine")
	}
	s.beatMu.Lock()
	last := s.lastBeat
	s.beatMu.Unlock()
	if last.After(s.quarantined.Add(time.Second)) {
		return fmt.Errorf("a heartbeat came %v after the quarantine", last.Sub(s.quarantined))
	}
	if banner := sshBanner(ctx, s.port); banner != "" {
		return fmt.Errorf("a new connection is answered: %s", banner)
	}
	s.progress("last sign of life %+.2f s from the quarantine; a new connection gets no answer", last.Sub(s.quarantined).Seconds())
	return nil
}
