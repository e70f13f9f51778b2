// Command demo plays vigia's main job on a real guest: an attacker logs in to a Debian machine, takes the password file and
// runs john on it; vigia, from outside, sees the read and the load, quarantines the machine, and keeps what happened
// where root in the guest can't reach it. Every step is checked: the demo fails where one does not hold.
//
// `make demo` runs it. It needs bin/vigia, and keeps the image it builds in .cache/demo for the next time.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"vigia/internal/lab"
)

const (
	machineName = "web"
	user        = "alice"
	password    = "sunshine" // what a dictionary finds first
	wholeTime   = 15 * time.Minute
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(ctx, wholeTime)
	err := run(ctx)
	cancel()
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
}

// stage is what the steps of the play share.
type stage struct {
	*teller
	*lab.Lab
	port string // of the machine's ssh on this host
	intruder
	caught
}

func run(ctx context.Context) error {
	tell := newTeller(os.Stdout)
	tell.title("vigia: a machine under guard, and an intruder in it")
	l, err := lab.Start(ctx, ".cache/demo")
	if err != nil {
		return err
	}
	defer l.End()
	s := &stage{teller: tell, Lab: l}
	defer s.clean()
	for _, step := range []struct {
		does string
		f    func(context.Context) error
	}{
		{"build the machine's image: a Debian with the real john in it, nothing of vigia", s.image},
		{"start the machine, its ssh port published on this host", s.start},
		{"wait until it answers", s.answer},
		{"see that its network works", s.networkWorks},
		{"the intruder guesses a password and logs in over ssh", s.logIn},
		{"takes /etc/shadow and /etc/gshadow", s.takePasswords},
		{"starts john on them", s.startJohn},
		{"vigia watches from below; the rule password-cracking wants 30 s of load", s.waitForQuarantine},
		{"the intruder's connection is dead", s.connectionDead},
		{"nothing gets out of the machine, and nobody gets in", s.nothingPasses},
		{"root in the machine wipes /var/log", s.wipeLogs},
		{"the ledger still has it all", s.ledgerHasAll},
		{"the ledger verifies", s.verify},
		{"one bit flipped in a copy of it is found", s.flipBit},
	} {
		s.begin(step.does)
		if err := step.f(ctx); err != nil {
			s.fail()
			return fmt.Errorf("%s: %w", step.does, err)
		}
		s.done()
	}
	s.timeline()
	return nil
}
