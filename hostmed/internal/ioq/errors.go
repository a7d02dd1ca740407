package ioq

// ErrorKind says what a driver did to make a queue fail.
type ErrorKind uint8

// What can be wrong with a queue.
const (
	BadSQTail     ErrorKind = iota // an SQ tail doorbell value that cannot be
	BadCQHead                      // a CQ head doorbell value that cannot be
	NoQueue                        // a doorbell of a queue that does not exist
	MemoryFault                    // guest memory was taken away under the queue, without a word
	MemoryRevoked                  // the client unmapped the queue's memory
)

func (k ErrorKind) String() string {
	return [...]string{"invalid SQ tail", "invalid CQ head", "doorbell of no queue", "guest memory fault", "memory unmapped"}[k]
}

// QueueError is reported to the control side when a queue has failed.
type QueueError struct {
	QID  uint16
	Kind ErrorKind
	Err  error
}
