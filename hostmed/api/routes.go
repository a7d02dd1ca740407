package api

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"strconv"

	"github.com/shadowbell/shadowbell/shared/inspect"
	"github.com/shadowbell/shadowbell/shared/inspect/attach"
)

// routes is what can be asked. Answers are JSON; one that is not 200 has {"error": {"code", "message"}}.
func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/controllers", func(w http.ResponseWriter, q *http.Request) { reply(w, s.m.List(), nil) })
	mux.HandleFunc("GET /v1/inspect", func(w http.ResponseWriter, q *http.Request) {
		v, err := s.m.Inspect(q.Context(), q.FormValue("controller"))
		reply(w, v, err)
	})
	mux.HandleFunc("GET /v1/stats", func(w http.ResponseWriter, q *http.Request) {
		v, err := s.m.Counters(q.Context(), q.FormValue("controller"))
		reply(w, v, err)
	})
	mux.HandleFunc("POST /v1/controllers/{controller}/queues/{qid}/kick", s.kick)
	mux.HandleFunc("GET "+attach.Path, s.attach)
	for _, x := range [...]struct{ path, method string }{
		{"/v1/controllers", "GET"}, {"/v1/inspect", "GET"}, {"/v1/stats", "GET"}, {attach.Path, "GET"}, {"/v1/controllers/{controller}/queues/{qid}/kick", "POST"},
	} {
		mux.HandleFunc(x.path, func(w http.ResponseWriter, q *http.Request) {
			w.Header().Set("Allow", x.method)
			refuse(w, http.StatusMethodNotAllowed, &attach.Error{Code: "method", Message: q.URL.Path + " takes " + x.method})
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, q *http.Request) {
		refuse(w, http.StatusNotFound, &attach.Error{Code: "no-path", Message: "there is no " + q.URL.Path + ": see docs/control.md"})
	})
	return mux
}

// withConn lets admitted find the connection of a request.
func withConn(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

type connKey struct{}

// admitted answers those who are turned away, and hangs up.
func admitted(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		c, ok := q.Context().Value(connKey{}).(*conn)
		if ok && c.refused == nil {
			h.ServeHTTP(w, q)
			return
		}
		w.Header().Set("Connection", "close")
		status, why := http.StatusForbidden, &attach.Error{Code: "forbidden", Message: "not a connection of the control socket"}
		if ok {
			if why = c.refused; why.Code == "busy" {
				status = http.StatusServiceUnavailable
			}
		}
		refuse(w, status, why)
	})
}

func (s *Server) kick(w http.ResponseWriter, q *http.Request) {
	qid, err := strconv.ParseUint(q.PathValue("qid"), 10, 16)
	if err != nil {
		refuse(w, http.StatusBadRequest, &attach.Error{Code: "bad-queue", Message: "a queue is a number from 0 to 65535"})
		return
	}
	k, err := s.m.Kick(q.Context(), q.PathValue("controller"), uint16(qid))
	if err == nil {
		s.log.Info("queue kicked", "controller", q.PathValue("controller"), "queue", qid, "state", k.State, "woken", k.Woken, "found", k.Found)
	}
	reply(w, k, err)
}

// reply answers with v, or with err.
func reply(w http.ResponseWriter, v any, err error) {
	if err != nil {
		refuse(w, statusOf(err), attach.ErrorOf(err))
		return
	}
	write(w, http.StatusOK, v)
}

func refuse(w http.ResponseWriter, status int, e *attach.Error) {
	write(w, status, struct {
		Error *attach.Error `json:"error"`
	}{e})
}

func write(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the client may be gone
}

func statusOf(err error) int {
	switch {
	case errors.Is(err, inspect.ErrNoController), errors.Is(err, inspect.ErrNoQueue):
		return http.StatusNotFound
	case errors.Is(err, inspect.ErrNoClient):
		return http.StatusConflict
	case errors.Is(err, inspect.ErrBusy):
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}
