package vmlab

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestPieces: what is fetched is what the sums say, by ranges, and from a server that knows none.
func TestPieces(t *testing.T) {
	aptSays(t, "")
	data := make([]byte, 64<<10)
	for i := range data {
		data[i] = byte(i * i >> 5)
	}
	cut := func(file string, at, size int64) piece {
		return piece{file, at, size, fmt.Sprintf("%x", sha256.Sum256(data[at:at+size]))}
	}
	good := []piece{cut("a/one", 100, 1), cut("a/two", 101, 4000), cut("b/three", 60000, 5536)}
	var sent, requests int
	serve := func(ranges bool) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			requests++
			if !ranges {
				r.Header.Del("Range")
			}
			http.ServeContent(countTo{w, &sent}, r, "", time.Time{}, bytes.NewReader(data))
		}
	}
	short := 1
	for name, c := range map[string]struct {
		server   http.HandlerFunc
		pieces   []piece
		says     string
		mirror   bool // another may do better
		requests int
		sent     int
	}{
		"ranges":       {serve(true), good, "", false, 3, 9537},
		"whole":        {serve(false), good, "", false, 1, 65536},
		"another file": {serve(true), []piece{{"a", 0, 10, good[0].sum}}, "SHA-256", false, 1, 10},
		"absent":       {http.NotFound, good, "404", true, 0, 0},
		"too short":    {serve(true), []piece{{"a", 65530, 10, good[0].sum}}, "EOF", true, 3, 18},
		"cut off once": {func(w http.ResponseWriter, r *http.Request) {
			if short--; short < 0 {
				serve(true)(w, r)
				return
			}
			w.Header().Set("Content-Length", "1")
			w.WriteHeader(http.StatusPartialContent)
		}, good, "", false, 3, 9537},
	} {
		t.Run(name, func(t *testing.T) {
			sent, requests = 0, 0
			s := httptest.NewServer(c.server)
			defer s.Close()
			t.Setenv(envUbuntu, s.URL+"/")
			dir := t.TempDir()
			err := (&build{ctx: t.Context()}).ubuntu("pool/x.deb", c.pieces, dir)
			if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), s.URL+"/pool/x.deb")) || errors.Is(err, ErrMirror) != c.mirror {
				t.Errorf("%v", err)
			}
			if requests != c.requests || sent != c.sent {
				t.Errorf("%d requests for %d bytes, want %d and %d", requests, sent, c.requests, c.sent)
			}
			for _, p := range c.pieces {
				if got, err := os.ReadFile(filepath.Join(dir, p.file)); c.says == "" && (err != nil || !bytes.Equal(got, data[p.at:p.at+p.size])) {
					t.Errorf("%s: %v", p.file, err)
				} else if c.says != "" && err == nil {
					t.Errorf("%s is there", p.file)
				}
			}
		})
	}
	t.Setenv(envUbuntu, "http://127.0.0.1:1")
	err := (&build{ctx: t.Context()}).ubuntu("pool/x.deb", good, t.TempDir())
	if !errors.Is(err, ErrMirror) || !strings.Contains(err.Error(), "127.0.0.1:1") || !strings.Contains(err.Error(), envUbuntu+"=URL") {
		t.Errorf("a mirror that is not there: %v", err)
	}
}

// countTo counts what a server sends.
type countTo struct {
	http.ResponseWriter
	n *int
}

func (c countTo) Write(b []byte) (int, error) {
	*c.n += len(b)
	return c.ResponseWriter.Write(b)
}

// aptSays is all that apt is configured for.
func aptSays(t *testing.T, text string) {
	t.Helper()
	config := filepath.Join(t.TempDir(), "apt.conf")
	if err := os.WriteFile(config, []byte(`Dir::Etc::Main "/dev/null"; Dir::Etc::Parts "/dev/null"; `+text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("APT_CONFIG", config)
}

// TestProxyOfApt: what apt is told of proxies holds for what the lab fetches itself.
func TestProxyOfApt(t *testing.T) {
	if _, err := exec.LookPath("apt-config"); err != nil {
		t.Skip(err)
	}
	for _, c := range []struct{ text, want string }{
		{`Acquire::http::Proxy "http://proxy.example:3128";`, "http://proxy.example:3128"},
		{`Acquire::http::Proxy "http://proxy.example:3128"; Acquire::http::Proxy::mirror.example "http://other.example:80";`, "http://other.example:80"},
		{`Acquire::http::Proxy "http://proxy.example:3128"; Acquire::http::Proxy::mirror.example "DIRECT";`, ""},
	} {
		aptSays(t, c.text)
		r := httptest.NewRequest(http.MethodGet, "http://mirror.example/ubuntu", nil)
		u, err := (&build{ctx: t.Context()}).proxy(r)
		if err != nil || c.want == "" && u != nil || c.want != "" && (u == nil || u.String() != c.want) {
			t.Errorf("%s: %v, %v", c.text, u, err)
		}
	}
}
