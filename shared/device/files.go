package device

// FileUser is a Device that goes on making system calls on its files after it was opened.
type FileUser interface {
	Files() Files
}

// FilesOf returns what d says, or that there is none.
func FilesOf(d Device) Files {
	if u, ok := d.(FileUser); ok {
		return u.Files()
	}
	return Files{VFIODevice: -1}
}
