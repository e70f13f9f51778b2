package jail

import (
	"encoding/json"
	"strings"
	"testing"
)

// A host that refuses namespaces, or their use, as Ubuntu does by AppArmor: landlock and the filter stand alone, all
// attempts still fail, and the process is told to be without the walls that are missing.
func TestLesserHost(t *testing.T) {
	for _, c := range callers() {
		for _, refusal := range []string{"namespaces", "mounts"} {
			for _, profile := range profileNames {
				t.Run(strings.Join([]string{c.name, refusal, profile}, " "), func(t *testing.T) {
					t.Parallel()
					o := c.drive(t, profile, refusal, "all")["all"]
					if o.Error != "" {
						t.Fatal(o.Error)
					}
					lack := lacking(o.Measures)
					for _, name := range []string{"namespaces", "empty root"} {
						if lack[name] == "" {
							t.Errorf("nobody is told that there is no %s", name)
						}
					}
					if lack["landlock"] != "" || lack["seccomp"] != "" {
						t.Errorf("%v", lack)
					}
					checkLesser(t, o.Said)
				})
			}
		}
	}
}

// checkLesser wants what landlock and the filter can give: nothing is read, written or reached.
func checkLesser(t *testing.T, said []byte) {
	t.Helper()
	var met map[string]string
	if err := json.Unmarshal(said, &met); err != nil {
		t.Fatal(err)
	}
	for attempt, message := range met {
		if message == "" {
			t.Errorf("%s got through", attempt)
		}
	}
}

// Without landlock the namespaces stand alone, and it is told.
func TestNoLandlock(t *testing.T) {
	for _, c := range callers() {
		o := c.drive(t, "qemu", "landlock", "all")["all"]
		if o.Error != "" || lacking(o.Measures)["landlock"] == "" {
			t.Fatalf("%s: %s %v", c.name, o.Error, o.Measures)
		}
		checkAll(t, o)
	}
}

// Without both, nothing starts.
func TestNothingToConfineWith(t *testing.T) {
	for _, c := range callers() {
		for _, profile := range profileNames {
			o := c.drive(t, profile, "everything", "live")["live"]
			if !strings.Contains(o.Error, "neither namespaces nor landlock") || len(o.Said) > 0 {
				t.Errorf("%s %s: %+v", c.name, profile, o)
			}
		}
	}
}
