package backend

// fifo is a queue that keeps its memory. Its length is bounded by what its owner puts in.
type fifo[T any] struct {
	buf  []T // a power of two long
	head int
	n    int
}

func (f *fifo[T]) push(v T) {
	if f.n == len(f.buf) {
		grown := make([]T, max(16, 2*len(f.buf)))
		for i := range f.n {
			grown[i] = f.buf[(f.head+i)&(len(f.buf)-1)]
		}
		f.buf, f.head = grown, 0
	}
	f.buf[(f.head+f.n)&(len(f.buf)-1)] = v
	f.n++
}

// pop returns the oldest value. The queue must not be empty.
func (f *fifo[T]) pop() T {
	var none T
	v := f.buf[f.head]
	f.buf[f.head] = none
	f.head = (f.head + 1) & (len(f.buf) - 1)
	f.n--
	return v
}
