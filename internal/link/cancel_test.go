package link

import (
	"context"
	"errors"
	"testing"
	"time"
)

// TestCallersLeaving sees that a handler ends when its caller does not wait any more: otherwise callers who leave would
// fill the slots that all calls share.
func TestCallersLeaving(t *testing.T) {
	a, b := pair(t)
	left := make(chan struct{}, MaxInFlight)
	server := New(b, func(ctx context.Context, r Request) (Response, error) {
		if r.Method == "quick" {
			return Response{}, nil
		}
		<-ctx.Done()
		left <- struct{}{}
		return Response{}, ctx.Err()
	})
	defer server.Close()
	client := New(a, nil)
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	for range MaxInFlight {
		go client.Call(ctx, "slow", nil, nil)
	}
	<-ctx.Done()
	for range MaxInFlight {
		<-left
	}
	for {
		_, err := client.Call(t.Context(), "quick", nil, nil)
		if err == nil {
			return
		}
		var busy RemoteError // the last of them is just leaving
		if !errors.As(err, &busy) {
			t.Fatalf("after all have left: %v", err)
		}
	}
}
