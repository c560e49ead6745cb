"""Images: local, plain, sparse files that cache the blocks of slices, stage what is not uploaded, and buffer writes.

`docs/format.md` has the files of a cache directory byte by byte; docs/adr/0010 says why they are trusted the way they are.

    disk        the system calls
    directory   names, lock and version of a cache directory
    layout      which frames a slice has, and where
    sidefile    presence and digests of the frames of a big image
    image       one open image, and the disk work on it
    open_images which images are open, and which threads use them; bounded descriptors
    exclusive   one task at a time for the files of one slice
    index       what lies in the cache and in which order it was used, small enough for millions
    pending     small images that are written after the reply
    cache       the facade: read, store, adopt, forget; errors become misses
    draft       the image of a slice that is being written
    staging     sealed images that wait for upload, durable by name
    eviction    least recently used down to the limits
    scrub       compares what lies there with its digests

Two kinds. A *small* image (one block of at most 1 MiB) is one file, there whole or not at all; it is verified against the
digest of the chunk map whenever it is read from the disk. A *big* image has a side file with the state and the digest of each
frame; its frames are trusted in the boot that wrote them and verified once by a later boot before they are used.
"""
