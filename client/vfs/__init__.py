"""POSIX on top of a metadata session and a chunk store. Knows no FUSE; the FUSE transports, the SDK and tests use it.

`Vfs` has one coroutine per system call, on inode numbers and handles; names are bytes. Errors are AtollError, whose errno
is the answer. Import from the modules: `client.vfs.vfs.Vfs`, `client.vfs.options.VfsOptions`, `client.vfs.virtual.VirtualFile`.
"""
