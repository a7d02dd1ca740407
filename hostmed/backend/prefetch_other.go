//go:build !amd64

package backend

func prefetch(*byte) {}
