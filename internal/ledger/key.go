package ledger

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/mod/sumdb/note"
)

const (
	keyFile    = "key"
	pubKeyFile = "key.pub"
)

// loadKey reads the signing key, making it where neither it nor a ledger exists yet. A ledger whose key is gone is
// not given a new one: its heads would no longer verify, and somebody should know.
func loadKey(dir, path, origin string) (note.Signer, string, error) {
	skey, err := readKey(path)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(filepath.Join(dir, pubKeyFile)); err == nil {
			return nil, "", fmt.Errorf("%w: %s is missing: put it back, or move the ledger away to begin a new one", ErrKey, path)
		}
		skey, err = makeKey(path, origin)
	}
	if err != nil {
		return nil, "", fmt.Errorf("%w: %w", ErrKey, err)
	}
	signer, err := note.NewSigner(skey)
	if err != nil {
		return nil, "", fmt.Errorf("%w: %s: %v", ErrKey, path, err)
	}
	vkey, err := publicKey(skey)
	if err != nil {
		return nil, "", fmt.Errorf("%w: %s: %v", ErrKey, path, err)
	}
	return signer, vkey, publishKey(filepath.Join(dir, pubKeyFile), vkey)
}

func readKey(path string) (string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("%s may be read by others (mode %04o): chmod 600 it, and distrust it if others had access", path, st.Mode().Perm())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	return strings.TrimSuffix(string(b), "\n"), nil
}

func makeKey(path, origin string) (string, error) {
	if origin == "" {
		var b [4]byte
		rand.Read(b[:])
		origin = "vigia/" + hex.EncodeToString(b[:])
	}
	skey, _, err := note.GenerateKey(rand.Reader, origin)
	if err != nil {
		return "", fmt.Errorf("make a key for %q: %v", origin, err)
	}
	return skey, writeFile(path, []byte(skey+"\n"), 0o600)
}

// publicKey derives the verifier key of a signing key, whose form is PRIVATE+KEY+name+hash+base64(0x01, seed).
func publicKey(skey string) (string, error) {
	parts := strings.SplitN(skey, "+", 5)
	if len(parts) != 5 {
		return "", errors.New("not a signing key")
	}
	raw, err := base64.StdEncoding.DecodeString(parts[4])
	if err != nil || len(raw) != 1+ed25519.SeedSize {
		return "", errors.New("not an ed25519 signing key")
	}
	pub := ed25519.NewKeyFromSeed(raw[1:]).Public().(ed25519.PublicKey)
	return note.NewEd25519VerifierKey(parts[2], pub)
}

// canonicalSecret is the one spelling of a signing key, whose digits could also be capitals.
func canonicalSecret(skey, vkey string) string {
	parts, public := strings.SplitN(skey, "+", 5), strings.SplitN(vkey, "+", 3)
	raw, err := base64.StdEncoding.Strict().DecodeString(parts[len(parts)-1])
	if err != nil || len(public) != 3 {
		return ""
	}
	return "PRIVATE+KEY+" + public[0] + "+" + public[1] + "+" + base64.StdEncoding.EncodeToString(raw)
}

// checkKey makes sure that vkey is a public key in its one spelling.
func checkKey(vkey string) (note.Verifier, error) {
	v, err := note.NewVerifier(vkey)
	if err != nil {
		return nil, fmt.Errorf("%w: public key: %v", ErrKey, err)
	}
	parts := strings.SplitN(vkey, "+", 3)
	raw, err := base64.StdEncoding.Strict().DecodeString(parts[len(parts)-1])
	if err != nil || len(raw) != 1+ed25519.PublicKeySize {
		return nil, fmt.Errorf("%w: not an ed25519 public key", ErrKey)
	}
	if canonical, err := note.NewEd25519VerifierKey(v.Name(), raw[1:]); err != nil || canonical != vkey {
		return nil, fmt.Errorf("%w: public key is not in its usual spelling", ErrKey)
	}
	return v, nil
}

// publishKey writes key.pub, or checks that the one there is this key's.
func publishKey(path, vkey string) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return writeFile(path, []byte(vkey+"\n"), 0o644)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrKey, err)
	}
	if string(b) != vkey+"\n" {
		return fmt.Errorf("%w: %s is not the public half of the signing key", ErrKey, path)
	}
	return nil
}

// ReadKey reads the public key beside a ledger. It is as trustworthy as the directory: to prove anything to others,
// keep a copy of the key elsewhere.
func ReadKey(dir string) (string, error) {
	b, err := os.ReadFile(filepath.Join(dir, pubKeyFile))
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrKey, err)
	}
	vkey, newline := strings.CutSuffix(string(b), "\n")
	if _, err := checkKey(vkey); err != nil {
		return "", fmt.Errorf("%s: %w", pubKeyFile, err)
	}
	if !newline {
		return "", fmt.Errorf("%w: %s is cut off", ErrKey, pubKeyFile)
	}
	return vkey, nil
}

// checkKeys makes sure that key.pub, and the private key where it lies here and may be read, are those of vkey.
func checkKeys(dir, vkey string) error {
	b, err := os.ReadFile(filepath.Join(dir, pubKeyFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %s", ErrMissing, pubKeyFile)
	case err != nil:
		return fmt.Errorf("%w: %w", ErrKey, err)
	case string(b) != vkey+"\n":
		return fmt.Errorf("%w: %s is not the key the ledger is checked against", ErrKey, pubKeyFile)
	}
	b, err = os.ReadFile(filepath.Join(dir, keyFile))
	if err != nil {
		return nil // an auditor's copy has none
	}
	skey, newline := strings.CutSuffix(string(b), "\n")
	if pub, err := publicKey(skey); !newline || err != nil || pub != vkey || canonicalSecret(skey, vkey) != skey {
		return fmt.Errorf("%w: %s does not belong to %s", ErrKey, keyFile, pubKeyFile)
	}
	if _, err := note.NewSigner(skey); err != nil {
		return fmt.Errorf("%w: %s: %v", ErrKey, keyFile, err)
	}
	return nil
}
