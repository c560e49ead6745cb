-- Packs: small slices that are gathered into objects. Conventions as in 0001.

-- Each inline slice that may be gathered, until the job that packs has looked at it. A hint: losing one costs a row of `slice`, no more.
CREATE TABLE IF NOT EXISTS packable (
    volume INTEGER NOT NULL,      -- volume.id
    slice_id INTEGER NOT NULL,    -- the slice; it may be gone
    ino INTEGER NOT NULL,         -- the file that was written; it may be gone, or name the slice no more
    chunk_index INTEGER NOT NULL, -- which chunk of it
    written_ns INTEGER NOT NULL,  -- when it was committed, ns since 1970
    PRIMARY KEY (volume, slice_id)
) STRICT, WITHOUT ROWID;

-- Each slice that was gathered from small ones. The row may outlive its slice until the job that packs comes by.
CREATE TABLE IF NOT EXISTS pack (
    volume INTEGER NOT NULL,   -- volume.id
    slice_id INTEGER NOT NULL, -- the slice
    refs INTEGER NOT NULL,     -- refs that it was made for, > 0; slice.refs says how many there are now
    members BLOB NOT NULL,     -- the chunks that they were in: for each the inode (8 bytes) and the index (4 bytes), little-endian
    UNIQUE (volume, slice_id)
) STRICT;
