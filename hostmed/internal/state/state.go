// Package state keeps what has to outlive a client, or hostmed: counters, saved features, identifiers. A [Store]
// holds values by key, each as JSON in a file of its own that is replaced whole: after a crash there is the old
// value or the new one, never a part of either.
//
// What it does not do: it knows nothing of what it keeps, and it is not for the data path: Save waits for the disk.
package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// Store keeps values by key. Any goroutine may call it.
type Store interface {
	// Load fills v, a pointer, with what was saved under key; found is false, and v as it was, if there
	// is nothing. A [*CorruptError] says that there was something that cannot be read, of which parts may be in v: it is moved out of the way, and the caller
	// may go on as if there had been nothing.
	Load(key string, v any) (found bool, err error)
	// Save keeps v under key; when it returns nil, v survives a crash of the machine.
	Save(key string, v any) error
	// Close ends the use of the store.
	Close() error
}

const (
	formatVersion = 1
	maxFileSize   = 16 << 20
	maxKey        = 100
	suffix        = ".json"
)

// envelope is what a file holds. Key says what the file was written for, in case it was renamed.
type envelope struct {
	Version int             `json:"version"`
	Key     string          `json:"key"`
	Data    json.RawMessage `json:"data"`
}

// CorruptError is a file of a store that cannot be read. It was moved to Moved, or is still there if that is empty.
type CorruptError struct {
	Path, Moved string
	Err         error
}

func (e *CorruptError) Error() string {
	if e.Moved == "" {
		return fmt.Sprintf("state %s: %v; it is ignored and will be replaced: move it away to keep it", e.Path, e.Err)
	}
	return fmt.Sprintf("state %s: %v; it is ignored and was moved to %s: repair it and move it back while hostmed is down, or delete it", e.Path, e.Err, e.Moved)
}

func (e *CorruptError) Unwrap() error { return e.Err }

// checkKey accepts what is a plain file name everywhere.
func checkKey(key string) error {
	ok := len(key) > 0 && len(key) <= maxKey && key[0] != '.'
	for i := range len(key) {
		c := key[i]
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.')
	}
	if !ok {
		return fmt.Errorf("state key %.120q: 1 to %d letters, digits, '-', '_' and '.', not a '.' first", key, maxKey)
	}
	return nil
}

func encode(key string, v any) ([]byte, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	data, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("state %s: %w", key, err)
	}
	b, err := json.MarshalIndent(envelope{Version: formatVersion, Key: key, Data: data}, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("state %s: %w", key, err)
	}
	return append(b, '\n'), nil
}

func decode(key string, b []byte, v any) error {
	var e envelope
	if err := json.Unmarshal(b, &e); err != nil {
		return err
	}
	switch {
	case e.Version != formatVersion:
		return fmt.Errorf("format version %d, this hostmed knows %d", e.Version, formatVersion)
	case e.Key != key:
		return fmt.Errorf("was written for key %q", e.Key)
	}
	return json.Unmarshal(e.Data, v)
}

// dir is a store in a directory.
type dir struct {
	path string
	lock *os.File

	mu sync.Mutex // one temporary file at a time
}

// Open returns the store in a directory, which it makes if only that is missing. A directory has one user at a time.
func Open(path string) (Store, error) {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("state directory %s: cannot be made: %w; create the directory that it lies in, or choose another", path, err)
	}
	lock, err := os.OpenFile(filepath.Join(path, ".lock"), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory %s: %w; it must be a directory that user %d may write to", path, err, os.Getuid())
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("state directory %s: in use by another hostmed; stop it or choose another directory", path)
		}
		return nil, fmt.Errorf("state directory %s: cannot be locked: %w", path, err)
	}
	return &dir{path: path, lock: lock}, nil
}

func (d *dir) Close() error { return d.lock.Close() }

func (d *dir) Load(key string, v any) (bool, error) {
	if err := checkKey(key); err != nil {
		return false, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	path := filepath.Join(d.path, key+suffix)
	b, err := read(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err == nil {
		err = decode(key, b, v)
	}
	if err == nil {
		return true, nil
	}
	c := &CorruptError{Path: path, Err: err}
	if moved := filepath.Join(d.path, key+".corrupt"); os.Rename(path, moved) == nil {
		c.Moved = moved
	}
	return false, c
}

// read returns a regular file of sane size.
func read(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(errors.New("not a regular file"), err)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFileSize+1))
	if len(b) > maxFileSize {
		err = fmt.Errorf("larger than %d bytes", maxFileSize)
	}
	return b, err
}

// Save writes a temporary file, makes it durable, renames it, and makes the renaming durable.
func (d *dir) Save(key string, v any) error {
	b, err := encode(key, v)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	path := filepath.Join(d.path, key+suffix)
	tmp := path + ".tmp" // of a crash, if it is there: the lock says that nobody else writes it
	if err := write(tmp, b); err != nil {
		return errors.Join(fmt.Errorf("state %s: %w; is there room, and may user %d write?", path, err, os.Getuid()), os.RemoveAll(tmp))
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("state %s: %w", path, err)
	}
	return d.sync()
}

func write(path string, b []byte) error {
	if err := os.RemoveAll(path); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func (d *dir) sync() error {
	f, err := os.Open(d.path)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return errors.Join(f.Sync(), f.Close())
}

// memory is a store that ends with the process.
type memory struct {
	mu     sync.Mutex // guards values
	values map[string][]byte
}

// NewMemory returns a store that keeps nothing beyond the process.
func NewMemory() Store { return &memory{values: map[string][]byte{}} }

func (m *memory) Load(key string, v any) (bool, error) {
	if err := checkKey(key); err != nil {
		return false, err
	}
	m.mu.Lock()
	b := m.values[key]
	m.mu.Unlock()
	if b == nil {
		return false, nil
	}
	if err := decode(key, b, v); err != nil {
		return false, &CorruptError{Path: key, Err: err}
	}
	return true, nil
}

func (m *memory) Save(key string, v any) error {
	b, err := encode(key, v)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.values[key] = b
	return nil
}

func (m *memory) Close() error { return nil }
