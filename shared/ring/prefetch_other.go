//go:build !amd64

package ring

import "github.com/shadowbell/shadowbell/shared/nvme"

func prefetch(*nvme.Command, uint32) {}
