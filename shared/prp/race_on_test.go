//go:build race

package prp

// The race detector makes sync.Pool drop things at random, so that Walk's pool allocates.
const raceDetector = true
