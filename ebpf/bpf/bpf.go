// Package bpf has the kernel's side of package ebpf/trace: programs for its hooks, compiled for each architecture and embedded. trace.bpf.c says what
// there is; package trace loads what the running kernel can have.
package bpf

//go:generate go run ../../tools/bpfgen
