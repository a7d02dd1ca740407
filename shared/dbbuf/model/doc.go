// Package model holds Promela models of the shadow-doorbell protocol of package dbbuf, and the test that
// has spin check them. It has no Go code of its own.
//
//   - tso.pml: x86-TSO memory with explicit store buffers, so that a missing barrier shows
//   - doorbell.pml: Publish and Poll/Arm on a submission queue
//   - quiet.pml: the quiet bit on a completion queue, with Publish and Arm on its head
//   - reset.pml: configuration, pause, reset and re-configuration of the page
//
// Each model is checked as it stands, for several ring sizes, and then with one step broken at a time
// (spin -DNAME; the head of each file lists the names): the checker must find that.
//
// The models cover one queue with bounded store buffers and say nothing about memory models weaker than
// x86-TSO, nor about the Go code itself: package dbbuf's own tests do that.
package model
