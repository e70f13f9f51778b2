package policy

import (
	"embed"
	"io/fs"
	"path"
)

//go:embed rules/*.yaml
var starter embed.FS

// Starter reads the rules that come with vigia. Each has a scenario in testdata that shows what it finds and what it
// leaves alone.
func Starter(responses []string) ([]Rule, error) {
	var all []Rule
	names, err := fs.Glob(starter, "rules/*.yaml")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		data, err := starter.ReadFile(name)
		if err != nil {
			return nil, err
		}
		rules, err := Parse(path.Base(name), data, responses)
		if err != nil {
			return nil, err
		}
		all = append(all, rules...)
	}
	return all, nil
}
