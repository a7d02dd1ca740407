// Package devfaults has the tests in which guestdrv, as a program in a guest with Debian's stock kernel, meets devices that fail: hostmed's media
// that fail on purpose, by sysfs and by VFIO, and QEMU's own controller that is unplugged under load.
package devfaults
