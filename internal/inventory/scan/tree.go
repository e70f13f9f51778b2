package scan

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"io/fs"
	"strings"
	"time"
)

// Certificate is an X.509 certificate that a service of the guest shows.
type Certificate struct {
	File     string    `json:"file"`
	Subject  string    `json:"subject"`
	Print    string    `json:"print"` // of the whole, SHA-256, its first 16 hexadecimal digits
	NotAfter time.Time `json:"not_after"`
}

// certificateDirs are where services' own certificates lie. The authorities' (/etc/ssl/certs, /usr/share) are the packages'.
var certificateDirs = []string{"/etc/letsencrypt/live/", "/etc/ssl/private/", "/etc/ssl/local/", "/etc/nginx/", "/etc/apache2/", "/etc/postfix/", "/etc/dovecot/",
	"/etc/haproxy/", "/etc/pki/tls/certs/", "/etc/kubernetes/pki/", "/etc/openvpn/", "/srv/", "/opt/"}

// tree walks the whole file system for what only a walk finds.
func (r *reader) tree() {
	r.walk("/", 0)
	if r.inodes >= maxInodes {
		r.note("more than %d files: the others were not looked at", maxInodes)
	}
}

func (r *reader) walk(dir string, depth int) {
	if depth > maxDepth || r.inodes >= maxInodes {
		return
	}
	list, err := r.fs.ReadDir(dir, maxInodes-r.inodes)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			r.note("%s: %v", dir, err)
		}
	}
	for _, e := range list {
		name := e.Name()
		if name == "." || name == ".." {
			continue
		}
		r.inodes++
		at := join(dir, name)
		switch mode := e.Mode(); {
		case e.IsDir():
			r.walk(at, depth+1)
		case mode.IsRegular() && mode&(fs.ModeSetuid|fs.ModeSetgid) != 0:
			if room(r, r.Privileged, "set-uid files") {
				r.Privileged = append(r.Privileged, File{Path: text(at), UID: e.UID, GID: e.GID, Mode: mode.String()})
			}
		case certificate(at):
			r.certificates(at)
		}
	}
}

func certificate(at string) bool {
	if !strings.HasSuffix(at, ".pem") && !strings.HasSuffix(at, ".crt") && !strings.HasSuffix(at, ".cer") {
		return false
	}
	for _, d := range certificateDirs {
		if strings.HasPrefix(at, d) {
			return true
		}
	}
	return false
}

func (r *reader) certificates(at string) {
	for _, c := range parseCertificates(r.file(at, maxFile)) {
		if !room(r, r.Certificates, "certificates") {
			return
		}
		c.File = text(at)
		r.Certificates = append(r.Certificates, c)
	}
}

// parseCertificates reads PEM: the first of a file is the service's, those behind it its chain's.
func parseCertificates(b []byte) (list []Certificate) {
	for len(list) < 16 {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			return list
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			continue
		}
		sum := sha256.Sum256(c.Raw)
		list = append(list, Certificate{Subject: text(c.Subject.String()), Print: hex.EncodeToString(sum[:8]), NotAfter: c.NotAfter.UTC()})
	}
	return list
}
