// Package trace tests ebpf/trace where there is an NVMe driver: in guests with a controller of QEMU's, on the stock kernel and on the one from
// backports. What fio says it did is what must have been counted.
package trace
