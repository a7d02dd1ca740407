package main

import (
	"context"
	"fmt"

	"github.com/shadowbell/shadowbell/shared/events"
	"github.com/shadowbell/shadowbell/shared/inspect/attach"
	"github.com/shadowbell/shadowbell/tools/internal/cli"
)

// workers are the rings of a hostmed's workers.
type workers struct {
	client  *attach.Client
	conn    *attach.Conn
	readers []*events.Reader
}

// openTaps makes hostmed record. A test puts its own here.
var openTaps = func(ctx context.Context, control string) (taps, error) {
	w := &workers{client: attach.New(control)}
	if err := w.open(ctx); err != nil {
		w.close()
		return nil, cli.UsageError{Err: err}
	}
	return w, nil
}

func (w *workers) open(ctx context.Context) (err error) {
	if w.conn, err = w.client.Attach(ctx); err != nil {
		return err
	}
	files, _, err := w.conn.Listen(ctx, events.DefaultRecords)
	if err != nil {
		return err
	}
	for i, f := range files {
		if err == nil {
			var r *events.Reader
			if r, err = events.Map(int(f.Fd())); err == nil {
				w.readers = append(w.readers, r)
			} else {
				err = fmt.Errorf("ring %d of hostmed's: %w", i, err)
			}
		}
		f.Close()
	}
	return err
}

func (w *workers) rings() []*events.Reader { return w.readers }

func (w *workers) media(ctx context.Context) ([]events.Medium, error) { return w.conn.Media(ctx) }

func (w *workers) close() {
	if w.conn != nil {
		w.conn.Close()
	}
	w.client.Close()
	for _, r := range w.readers {
		r.Close()
	}
}
