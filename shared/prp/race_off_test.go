//go:build !race

package prp

const raceDetector = false
