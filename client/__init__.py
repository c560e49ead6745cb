"""The mounted client: POSIX on top of metasvc and chunkstore, its transports and its command line."""
