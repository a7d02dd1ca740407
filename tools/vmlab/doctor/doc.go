// Package doctor has nvmetrace doctor look at a stock Linux guest.
package doctor
