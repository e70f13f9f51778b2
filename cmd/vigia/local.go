package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/coreos/go-systemd/v22/daemon"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
	"vigia/internal/cli"
	vigiad "vigia/internal/daemon"
	"vigia/internal/event"
	"vigia/internal/host"
	"vigia/internal/jail"
	"vigia/internal/ledger"
	"vigia/internal/link"
	"vigia/internal/policy"
	"vigia/internal/volume"
	"vigia/internal/worker"
)

// local is what the command line can do without a daemon.
func local() cli.Local {
	return cli.Local{Version: version, Serve: serve, Doctor: doctor, PolicyCheck: policyCheck, PolicyTest: policyTest,
		LedgerVerify: ledgerVerify, LedgerExport: ledgerExport, LedgerProve: ledgerProve, VolumeCheck: volumeCheck}
}

func serve(ctx context.Context, o cli.ServeOptions) error {
	level := slog.LevelInfo
	if o.Verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(o.Err, &slog.HandlerOptions{Level: level}))
	program, err := worker.Open(workerSum)
	if err == nil {
		err = jail.StartFrom(program)
	}
	if err != nil {
		log.Info("workers are started from this program itself, which takes them longer", "program", worker.Program, "why", err)
	}
	return vigiad.Run(ctx, vigiad.Options{State: o.State, Version: version, Accelerator: o.Accelerator, Rules: o.Rules, DayBudget: o.DayBudget, Spares: o.Spares,
		Check: link.CheckSchedule{Every: o.CheckEvery, FullEvery: o.CheckFullEvery}, Log: log, Ready: func() {
			log.Info("vigia serves", "state", o.State, "pid", os.Getpid())
			daemon.SdNotify(false, daemon.SdNotifyReady)
		}})
}

// doctor asks the host what works, and tries the confinement for real.
func doctor(ctx context.Context, state string, asJSON bool, w io.Writer) error {
	h := host.Host{State: state, Try: tryWalls}
	findings := h.Inspect(ctx)
	if asJSON {
		if err := printJSON(w, findings); err != nil {
			return err
		}
	} else if err := findings.Write(w); err != nil {
		return err
	}
	if findings.Worst() == host.Missing {
		return cli.ErrFound
	}
	return nil
}

// tryWalls confines a throwaway process for real and tells what came in force.
func tryWalls(ctx context.Context) ([]host.Wall, error) {
	tree, err := jail.OpenTree("/sys/fs/cgroup", "/proc/self", fmt.Sprintf("vigia-doctor-%d", os.Getpid()))
	if err != nil {
		tree = nil // the measures say so
	} else {
		defer tree.Remove()
	}
	var user *jail.User
	if os.Geteuid() == 0 {
		user = &jail.User{UID: vigiad.FirstUID - 2, GID: vigiad.FirstUID - 2}
	}
	measures, err := jail.Probe(ctx, user, tree)
	walls := make([]host.Wall, len(measures))
	for i, m := range measures {
		walls[i] = host.Wall(m)
	}
	return walls, err
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

func readRules(file string) ([]policy.Rule, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return policy.Parse(file, data, vigiad.Responses)
}

// policyCheck names every problem of every file; a rule that can't be used is a finding.
func policyCheck(files []string, w io.Writer) error {
	bad := false
	for _, file := range files {
		rules, err := readRules(file)
		var problems policy.Problems
		switch {
		case errors.As(err, &problems):
			bad = true
			for _, p := range problems {
				fmt.Fprintln(w, p)
			}
		case err != nil:
			return err
		default:
			ids := make([]string, len(rules))
			for i, r := range rules {
				ids[i] = r.ID
			}
			fmt.Fprintf(w, "%s: fine: %s\n", file, strings.Join(ids, ", "))
		}
	}
	if bad {
		return cli.ErrFound
	}
	return nil
}

// policyTest runs the rules of a file over recorded events: lines of JSON, the array that `vigia events -o json` prints,
// or a ledger's export.
func policyTest(file, events string, asJSON bool, w io.Writer) error {
	rules, err := readRules(file)
	if err != nil {
		return err
	}
	in := os.Stdin
	if events != "-" {
		if in, err = os.Open(events); err != nil {
			return err
		}
		defer in.Close()
	}
	decisions, err := policy.RunRecorded(rules, recorded(bufio.NewReader(in)))
	if err != nil {
		return fmt.Errorf("%s: %w", events, err)
	}
	if asJSON {
		if decisions == nil {
			decisions = []policy.Decision{}
		}
		return printJSON(w, decisions)
	}
	for _, d := range decisions {
		fmt.Fprintf(w, "%s  %s  %s  %s  respond: %s\n", d.Time.Format(time.RFC3339Nano), d.Machine, d.Severity, d.Rule, strings.Join(d.Respond, ", "))
	}
	fmt.Fprintf(w, "%d alerts\n", len(decisions))
	return nil
}

// recorded gives events as lines of JSON, whichever of the three forms they are written in.
func recorded(in *bufio.Reader) io.Reader {
	first, _ := in.Peek(64)
	array, export := bytes.HasPrefix(bytes.TrimSpace(first), []byte("[")), bytes.HasPrefix(first, []byte(`{"format":"vigia-ledger`))
	if !array && !export {
		return in
	}
	read, write := io.Pipe()
	go func() {
		write.CloseWithError(rewrite(in, write, array))
	}()
	return read
}

func rewrite(in io.Reader, out io.Writer, array bool) error {
	dec := json.NewDecoder(in)
	var head json.RawMessage
	if array {
		if _, err := dec.Token(); err != nil { // the bracket
			return err
		}
	} else if err := dec.Decode(&head); err != nil { // the export's first line
		return err
	}
	for dec.More() {
		var line struct{ Entry json.RawMessage }
		var item json.RawMessage
		if err := dec.Decode(&item); err != nil {
			return err
		}
		if !array {
			if err := json.Unmarshal(item, &line); err != nil {
				return err
			}
			item = line.Entry
		}
		var one bytes.Buffer
		if err := json.Compact(&one, item); err != nil {
			return err
		}
		one.WriteByte('\n')
		if _, err := out.Write(one.Bytes()); err != nil {
			return err
		}
	}
	if array {
		if _, err := dec.Token(); err != nil { // its end
			return fmt.Errorf("the array of events is cut short: %w", err)
		}
	}
	return nil
}

// ledgerPlace is the directory and the key that the options name.
func ledgerPlace(o cli.LedgerOptions) (dir, key string, err error) {
	dir = o.Dir
	if dir == "" {
		dir = filepath.Join(o.State, "ledger")
	}
	if _, err := os.Stat(dir); err != nil {
		return "", "", fmt.Errorf("ledger %s: %w: give a state with --state, or a ledger with --dir", dir, errors.Unwrap(err))
	}
	if o.Key == "" {
		key, err = ledger.ReadKey(dir)
		return dir, key, err
	}
	text, err := os.ReadFile(o.Key)
	return dir, strings.TrimSpace(string(text)), err
}

// ledgerVerify reads the whole ledger and checks every byte of it.
func ledgerVerify(ctx context.Context, o cli.LedgerOptions, asJSON bool, w io.Writer) error {
	if o.Proof != "" {
		return proofVerify(o, asJSON, w)
	}
	dir, key, err := ledgerPlace(o)
	if err != nil {
		return err
	}
	var opts ledger.VerifyOptions
	switch {
	case o.Head != "":
		if opts.Since, err = keptHead(o.Head, key); err != nil {
			return err
		}
	case o.Dir == "":
		if opts.Since, err = vigiad.KnownHead(o.State, key); err != nil {
			return fmt.Errorf("%w: %w", cli.ErrFound, err)
		}
	}
	report, err := ledger.Verify(ctx, dir, key, opts)
	if err != nil {
		if damaged(err) {
			return fmt.Errorf("%w: %s does not verify: %w", cli.ErrFound, dir, err)
		}
		return err
	}
	if asJSON {
		return printJSON(w, report)
	}
	fmt.Fprintf(w, "ledger verified: %d entries, root %s, sealed %s, %d files, %d bytes\n",
		report.Size, report.Root, report.Time.Format(time.RFC3339), report.Files, report.Bytes)
	return nil
}

// keptHead reads a head that somebody kept.
func keptHead(file, key string) (*ledger.Head, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	head, err := ledger.ParseHead(text, key)
	if err != nil {
		return nil, fmt.Errorf("%w: %s is no head of this ledger: %w", cli.ErrFound, file, err)
	}
	return &head, nil
}

// proofVerify checks a proof, or an export, against a key alone.
func proofVerify(o cli.LedgerOptions, asJSON bool, w io.Writer) error {
	if o.Key == "" {
		return errors.New("a proof says nothing without a key that came another way: give it with --key")
	}
	key, err := os.ReadFile(o.Key)
	if err != nil {
		return err
	}
	f, err := os.Open(o.Proof)
	if err != nil {
		return err
	}
	defer f.Close()
	entries := 0
	head, err := ledger.VerifyExport(f, strings.TrimSpace(string(key)), func(ledger.Entry) error { entries++; return nil })
	if err != nil {
		return fmt.Errorf("%w: %s does not verify: %w", cli.ErrFound, o.Proof, err)
	}
	if asJSON {
		return printJSON(w, struct {
			ledger.Head
			Entries int `json:"entries"`
		}{head, entries})
	}
	fmt.Fprintf(w, "proof verified: %d of %d entries, root %s, sealed %s\n", entries, head.Size, head.Root, head.Time.Format(time.RFC3339))
	return nil
}

// ledgerProve writes an export of the one entry that has the index or the event id.
func ledgerProve(ctx context.Context, o cli.LedgerOptions, entry string, w io.Writer) error {
	dir, key, err := ledgerPlace(o)
	if err != nil {
		return err
	}
	index, err := strconv.ParseUint(entry, 10, 64)
	if err != nil {
		if index, err = indexOf(ctx, dir, key, entry); err != nil {
			return err
		}
	}
	var proof bytes.Buffer
	if err := ledger.Export(ctx, dir, &proof, index, index+1); err != nil {
		return err
	}
	if bytes.Count(proof.Bytes(), []byte("\n")) < 2 {
		return fmt.Errorf("the ledger has no entry %d: see vigia ledger head", index)
	}
	_, err = w.Write(proof.Bytes())
	return err
}

// indexOf looks through the ledger for an event.
func indexOf(ctx context.Context, dir, key, id string) (uint64, error) {
	read, write := io.Pipe()
	defer read.Close()
	go func() { write.CloseWithError(ledger.Export(ctx, dir, write, 0, math.MaxUint64)) }()
	found, at := false, uint64(0)
	_, err := ledger.VerifyExport(read, key, func(e ledger.Entry) error {
		if ev, err := event.Unmarshal(e.Data); err == nil && ev.ID == id {
			found, at = true, e.Index
		}
		return nil
	})
	if err == nil && !found {
		err = fmt.Errorf("the ledger has no event %q: events -o json prints their ids", event.Text([]byte(id)))
	}
	return at, err
}

// damaged tells a ledger that was tampered with from one that can't be read.
func damaged(err error) bool {
	for _, e := range []error{ledger.ErrSignature, ledger.ErrCorrupt, ledger.ErrMissing, ledger.ErrUnexpected, ledger.ErrUnsealed, ledger.ErrRolledBack, ledger.ErrForked} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// ledgerExport writes the entries as JSON lines, each with its index, followed by the signed head.
func ledgerExport(ctx context.Context, o cli.LedgerOptions, w io.Writer) error {
	dir, _, err := ledgerPlace(o)
	if err != nil {
		return err
	}
	return ledger.Export(ctx, dir, w, 0, math.MaxUint64)
}

// volumeCheck reads a layer or overlay by the format's document alone. The target is a file, or a machine's or image's
// directory name in the state.
func volumeCheck(ctx context.Context, state, target string, asJSON bool, w io.Writer) error {
	f, err := openVolume(ctx, state, target)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	report, err := volume.Check(f, info.Size())
	if err != nil {
		return fmt.Errorf("volume %s: %w", target, err)
	}
	if asJSON {
		if err := printJSON(w, report); err != nil {
			return err
		}
	} else {
		printVolume(w, f.Name(), report)
	}
	if !report.Sound() {
		return fmt.Errorf("%w: volume %s is damaged", cli.ErrFound, target)
	}
	return nil
}

// openVolume finds a volume by its file, by a machine's name, which a daemon must tell, or by a machine's or image's id.
func openVolume(ctx context.Context, state, target string) (*os.File, error) {
	id := target
	if m, err := api.Dial(state).Machines.Show(ctx, connect.NewRequest(&vigiav1.MachineRequest{Name: target})); err == nil {
		id = m.Msg.Id
	}
	for _, path := range []string{target, filepath.Join(state, "machines", id, "overlay.vol"), filepath.Join(state, "images", target, "disk.layer"), filepath.Join(state, "layers", target+".vol")} {
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return os.Open(path)
		}
	}
	return nil, fmt.Errorf("volume %s: no such file, machine or image id (a machine's name is known while vigia serve runs)", target)
}

func printVolume(w io.Writer, name string, r volume.Report) {
	kind := "overlay"
	if r.Frozen {
		kind = "frozen layer"
	}
	fmt.Fprintf(w, "%s: %s %s, %d bytes, %d blocks of data, %d of zeros, generation %d, %d records in the log\n",
		name, kind, r.ID, r.Size, r.Data, r.Zero, r.Generation, r.Records)
	for _, n := range r.Notes {
		fmt.Fprintf(w, "note: %s\n", n)
	}
	for _, d := range r.Damage {
		fmt.Fprintf(w, "damage: %s\n", d)
	}
	if r.Sound() {
		fmt.Fprintln(w, "sound")
	}
}
