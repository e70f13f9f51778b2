package hostile

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"vigia/internal/api"
	"vigia/internal/api/vigiav1"
)

// TestEveryCallIsTold makes every call that the API has, with nothing in it and with nonsense, and looks for each in the
// record: who asked, for what, and what came of it. A call that is added to the API is tried here by itself.
func TestEveryCallIsTold(t *testing.T) {
	h := stubHost(t)
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	client := &http.Client{Transport: &http.Transport{Protocols: &protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(h.state, api.SocketName))
	}}}
	defer client.CloseIdleConnections()
	calls := everyCall()
	if len(calls) < 30 {
		t.Fatalf("the API has %d calls only: %v", len(calls), calls)
	}
	var all sync.WaitGroup
	for call, stream := range calls {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			post(ctx, client, call, stream, `{}`)
			post(ctx, client, call, stream, `{"no such field": [1, 2`)
		})
	}
	all.Wait()
	told, refused := map[string]bool{}, map[string]bool{}
	eventually(t, 20*time.Second, "word of every call", func() bool {
		h.events("", func(e *vigiav1.Event) {
			if e.Kind != "access.call" {
				return
			}
			call := field(e, "call").GetStringValue()
			told[call] = true
			refused[call] = refused[call] || field(e, "error").GetStringValue() != ""
			if int(field(e, "uid").GetNumberValue()) != os.Getuid() || field(e, "pid").GetNumberValue() < 2 {
				t.Fatalf("%v", e)
			}
		})
		return len(missing(calls, told)) == 0 && len(missing(calls, refused)) == 0
	}, func() string {
		return "not told: " + strings.Join(missing(calls, told), " ") + "; refusal not told: " + strings.Join(missing(calls, refused), " ")
	})
}

// everyCall lists the calls of the API, and which of them are streams.
func everyCall() map[string]bool {
	calls := map[string]bool{}
	protoregistry.GlobalFiles.RangeFilesByPackage("vigia.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				m := s.Methods().Get(j)
				calls["/"+string(s.FullName())+"/"+string(m.Name())] = m.IsStreamingClient() || m.IsStreamingServer()
			}
		}
		return true
	})
	return calls
}

func post(ctx context.Context, client *http.Client, call string, stream bool, body string) {
	kind := "application/json"
	if stream {
		kind = "application/connect+json"
		body = "\x00" + string(binary.BigEndian.AppendUint32(nil, uint32(len(body)))) + body
	}
	r, err := http.NewRequestWithContext(ctx, "POST", "http://vigia"+call, bytes.NewReader([]byte(body)))
	if err != nil {
		return
	}
	r.Header.Set("Content-Type", kind)
	if res, err := client.Do(r); err == nil {
		io.Copy(io.Discard, res.Body)
		res.Body.Close()
	}
}

func missing(want map[string]bool, have map[string]bool) []string {
	return slices.DeleteFunc(slices.Sorted(maps.Keys(want)), func(call string) bool { return have[call] })
}
