package image

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// aptSource is one place that apt gets packages from, as the host's own configuration has it.
type aptSource struct {
	uri, suite string
	components []string
	signedBy   string
}

// mirrors says where to get a recipe's packages from, as lines of a sources.list: the recipe's mirror, else what the
// host itself uses. Without lines mmdebstrap takes its own default for the suite.
func mirrors(r Recipe) []string {
	if r.Mirror != "" {
		return []string{fmt.Sprintf("deb %s %s %s", r.Mirror, r.Suite, strings.Join(r.Components, " "))}
	}
	return chooseMirrors(hostSources("/etc/apt"), r.Suite, r.Components)
}

// chooseMirrors takes the host's sources that have the suite itself, its updates and its security updates. Where the
// host runs another release of Debian, the same mirrors are asked for the wanted one.
func chooseMirrors(host []aptSource, suite string, components []string) []string {
	var lines []string
	has := func(want string) bool {
		return slices.ContainsFunc(host, func(s aptSource) bool { return s.suite == want })
	}
	add := func(from, want string) {
		for _, s := range host {
			if s.suite != from || strings.Contains(s.uri, "@") || !slices.Contains(s.components, "main") {
				continue
			}
			option := ""
			if s.signedBy != "" && s.suite == want {
				option = "[signed-by=" + s.signedBy + "] "
			}
			lines = append(lines, fmt.Sprintf("deb %s%s %s %s", option, s.uri, want, strings.Join(components, " ")))
			return
		}
	}
	from := suite
	for _, other := range debianSuites {
		if has(suite) {
			break
		}
		if has(other) {
			from = other
			break
		}
	}
	for _, pocket := range []string{"", "-updates", "-security"} {
		add(from+pocket, suite+pocket)
	}
	if len(lines) == 0 || !has(from) {
		return nil
	}
	return lines
}

var debianSuites = []string{"bookworm", "trixie", "forky", "sid", "bullseye", "stable", "testing", "unstable", "oldstable"}

// hostSources reads the host's apt configuration, both of its formats; what it does not understand it leaves out.
func hostSources(dir string) []aptSource {
	var all []aptSource
	lists, _ := filepath.Glob(filepath.Join(dir, "sources.list.d", "*.list"))
	for _, name := range append([]string{filepath.Join(dir, "sources.list")}, lists...) {
		text, _ := os.ReadFile(name)
		for line := range strings.Lines(string(text)) {
			all = append(all, parseOneLine(line)...)
		}
	}
	stanzas, _ := filepath.Glob(filepath.Join(dir, "sources.list.d", "*.sources"))
	for _, name := range stanzas {
		text, _ := os.ReadFile(name)
		for stanza := range strings.SplitSeq(string(text), "\n\n") {
			all = append(all, parseStanza(stanza)...)
		}
	}
	return all
}

// parseOneLine reads "deb [option=value …] URI SUITE COMPONENT…".
func parseOneLine(line string) []aptSource {
	line, _, _ = strings.Cut(line, "#")
	rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb ")
	if !ok {
		return nil
	}
	var s aptSource
	rest = strings.TrimSpace(rest)
	if options, after, ok := strings.Cut(rest, "]"); ok && strings.HasPrefix(rest, "[") {
		for _, o := range strings.Fields(options[1:]) {
			if v, ok := strings.CutPrefix(o, "signed-by="); ok {
				s.signedBy = v
			}
		}
		rest = after
	}
	f := strings.Fields(rest)
	if len(f) < 3 {
		return nil
	}
	s.uri, s.suite, s.components = f[0], f[1], f[2:]
	return []aptSource{s}
}

// parseStanza reads one stanza of the deb822 format. A key that is written into the stanza itself, over several lines,
// is left to mmdebstrap to find.
func parseStanza(stanza string) []aptSource {
	fields := map[string]string{}
	for line := range strings.Lines(stanza) {
		if strings.HasPrefix(line, "#") || strings.HasPrefix(line, " ") {
			continue
		}
		if key, value, ok := strings.Cut(line, ":"); ok {
			fields[strings.ToLower(strings.TrimSpace(key))] = strings.TrimSpace(value)
		}
	}
	if !slices.Contains(strings.Fields(fields["types"]), "deb") || strings.EqualFold(fields["enabled"], "no") {
		return nil
	}
	signedBy := fields["signed-by"]
	if !filepath.IsAbs(signedBy) {
		signedBy = ""
	}
	var all []aptSource
	for _, uri := range strings.Fields(fields["uris"]) {
		for _, suite := range strings.Fields(fields["suites"]) {
			all = append(all, aptSource{uri, suite, strings.Fields(fields["components"]), signedBy})
		}
	}
	return all
}

// proxies are the host's proxy settings, as options of apt.
func proxies(ctx context.Context) []string {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	text, err := exec.CommandContext(ctx, "apt-config", "dump", "Acquire").Output()
	if err != nil {
		return nil
	}
	var lines []string
	for line := range strings.Lines(string(text)) {
		name, _, _ := strings.Cut(line, " ")
		if slices.Contains([]string{"Acquire::http::Proxy", "Acquire::https::Proxy"}, name) {
			lines = append(lines, strings.TrimSuffix(strings.TrimSpace(line), ";"))
		}
	}
	return lines
}
