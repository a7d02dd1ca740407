// Package tracepath tests nvmetrace path where there are real queues: in a guest with controllers of QEMU's, hostmed runs over the kernel's nvme driver and
// over VFIO, and guestdrv is its guest. What guestdrv measures is what the spans must add up to.
package tracepath
