"""What an administrator does with an open volume: the same code in a command that opened it and in the holder.

``operations`` is the list; each operation is a coroutine on an Asked (``asking``) that returns a JSON object. Must not know
the command line, sockets or FUSE.
"""
