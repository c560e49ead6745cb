-- The metadata of many volumes of many tenants in one SQLite database.
--
-- Conventions for every table and column:
--   * Every table but `volume` is keyed by `volume` first (volume.id), so one volume's rows lie together, and every statement
--     is bound to one volume. There are no foreign keys: who references whom is a rule, rules live in metasvc/engine,
--     and `atoll fsck` checks them.
--   * No column is NULL unless its comment says what NULL means.
--   * `*_bytes` are bytes, `*_ns` nanoseconds since 1970-01-01 UTC (negative before), names are bytes (BLOB, compared
--     as memcmp), inode numbers are positive, integers are signed 64-bit.
--   * STRICT: a value of another type than the column's is an error and not stored.
--   * WITHOUT ROWID where rows are short: one tree instead of two, 30 % fewer bytes in the log for a create
--     (21.9 KiB instead of 31.5 KiB with pages of 4 KiB). `slice` holds file contents, and there a tree of wide
--     rows is slower than a table with an index: 100 creates of 4 KiB took 2.7 ms instead of 2.9 ms.
-- The rows and their invariants are those of metasvc/model.py, column for column.

-- Each volume, its format, and who owns it.
CREATE TABLE IF NOT EXISTS volume (
    -- Key of all other tables. AUTOINCREMENT: an id is never given out again, so that rows left of a deleted volume
    -- can never be taken for rows of a new one.
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    -- Owner of the volume in the sense of accounts; "local" in an embedded volume. NULL: the volume was deleted and its
    -- rows are being removed; then name is NULL as well.
    tenant TEXT,
    -- Name of the volume, unique in its tenant; "default" in an embedded volume. NULL as tenant.
    name TEXT,
    -- metasvc.model.VolumeFormat as a JSON object with its own version; tenant and name in it equal the columns.
    format TEXT NOT NULL,
    -- Random text chosen by the process that owns the volume. NULL: nobody owns it.
    owner_nonce TEXT,
    -- How to reach the owner, for messages and redirects. NULL if and only if owner_nonce is.
    owner_address TEXT,
    -- When the ownership expires unless it is renewed, by the wall clock of the machine. 0 if owner_nonce is NULL.
    owner_expires_ns INTEGER NOT NULL DEFAULT 0,
    -- Fencing number: grows by one with every change of owner, never shrinks. 0: never owned.
    epoch INTEGER NOT NULL DEFAULT 0,
    -- Number of the last batch committed, by any owner: grows by one with every commit. 0: none.
    last_batch INTEGER NOT NULL DEFAULT 0,
    UNIQUE (tenant, name)
) STRICT;

-- Each inode that has a name, is sustained (unlinked but open) or is in the trash.
CREATE TABLE IF NOT EXISTS inode (
    volume INTEGER NOT NULL,      -- volume.id
    ino INTEGER NOT NULL,         -- inode number, 1 = root, never reused in the volume
    mode INTEGER NOT NULL,        -- st_mode: file type and permission bits
    nlink INTEGER NOT NULL,       -- names of a file; 2 + subdirectories of a directory; 0 = unlinked (open, or in the trash)
    uid INTEGER NOT NULL,         -- user id, 0 to 2^32 - 1
    gid INTEGER NOT NULL,         -- group id, 0 to 2^32 - 1
    rdev INTEGER NOT NULL,        -- device number of a character or block device, else 0
    size_bytes INTEGER NOT NULL,  -- length of a file or symlink target in bytes; of a directory the NUMBER OF ENTRIES
    atime_ns INTEGER NOT NULL,    -- last access, ns since 1970
    mtime_ns INTEGER NOT NULL,    -- last change of content, ns since 1970
    ctime_ns INTEGER NOT NULL,    -- last change of the inode, ns since 1970
    parent INTEGER NOT NULL,      -- inode of the directory with its only name; 0 = several names (see link) or none; root: 1
    child_bytes INTEGER NOT NULL, -- directories: space in bytes of the regular files named in it, each name counted; else 0
    map_version INTEGER NOT NULL, -- grows by one with every change of the chunk map
    size_epoch INTEGER NOT NULL,  -- grows by one with every truncate that lowered the length
    PRIMARY KEY (volume, ino)
) STRICT, WITHOUT ROWID;

-- Each name. Invariant: for every row there is an inode row with (volume, ino), and `type` is its file type.
CREATE TABLE IF NOT EXISTS dentry (
    volume INTEGER NOT NULL, -- volume.id
    parent INTEGER NOT NULL, -- inode of the directory
    name BLOB NOT NULL,      -- 1 to 255 bytes, no 0x00, no 0x2F, neither "." nor ".."; stored as given, no encoding implied
    ino INTEGER NOT NULL,    -- inode that the name stands for
    type INTEGER NOT NULL,   -- file type bits (S_IFMT) of that inode
    PRIMARY KEY (volume, parent, name)
) STRICT, WITHOUT ROWID;

-- The chunk map: for each 64 MiB window of a file that holds any slice, which slices. No row = the window is a hole.
CREATE TABLE IF NOT EXISTS chunk (
    volume INTEGER NOT NULL,      -- volume.id
    ino INTEGER NOT NULL,         -- inode of the file
    chunk_index INTEGER NOT NULL, -- window: file offset // 67,108,864; 0 to 2^31 - 1
    refs BLOB NOT NULL,           -- 20 bytes each, little-endian: u32 offset in the chunk, u64 slice id, u32 offset in the slice, u32 length (all in bytes but the id); sorted by offset, never overlapping, never empty
    PRIMARY KEY (volume, ino, chunk_index)
) STRICT, WITHOUT ROWID;

-- Each slice that some chunk names. Immutable but for refs and the place of the bytes.
CREATE TABLE IF NOT EXISTS slice (
    volume INTEGER NOT NULL,   -- volume.id
    slice_id INTEGER NOT NULL, -- unique in the volume, never reused; part of the object keys
    length INTEGER NOT NULL,   -- bytes of the slice, > 0
    refs INTEGER NOT NULL,     -- how many refs of chunk.refs of the volume name it, > 0
    kind INTEGER NOT NULL,     -- metasvc.model.SliceKind: 0 = bytes are in data, 1 = bytes are in one object per block
    data BLOB NOT NULL,        -- kind 0: the bytes themselves; kind 1: BLAKE3-128 digests of the blocks' raw bytes, 16 bytes each, in order
    UNIQUE (volume, slice_id)
) STRICT;

-- Each extended attribute, POSIX ACLs among them.
CREATE TABLE IF NOT EXISTS xattr (
    volume INTEGER NOT NULL, -- volume.id
    ino INTEGER NOT NULL,    -- inode that has it
    name BLOB NOT NULL,      -- full name with its name space ("user.x", "system.posix_acl_access"), 1 to 255 bytes
    value BLOB NOT NULL,     -- 0 to 65,536 bytes; ACLs in the kernel's xattr encoding
    PRIMARY KEY (volume, ino, name)
) STRICT, WITHOUT ROWID;

-- In which directories a file with several names has them. No rows for inodes with nlink <= 1, none for directories.
-- Invariant: the sum of `names` over an inode is its nlink.
CREATE TABLE IF NOT EXISTS link (
    volume INTEGER NOT NULL, -- volume.id
    ino INTEGER NOT NULL,    -- inode of the file
    parent INTEGER NOT NULL, -- inode of a directory that names it
    names INTEGER NOT NULL,  -- how many names it has there, > 0
    PRIMARY KEY (volume, ino, parent)
) STRICT, WITHOUT ROWID;

-- Each client that is mounted, or was and is not yet cleaned up.
CREATE TABLE IF NOT EXISTS session (
    volume INTEGER NOT NULL,     -- volume.id
    session_id INTEGER NOT NULL, -- unique in the volume, never reused
    host TEXT NOT NULL,          -- host name, for people
    pid INTEGER NOT NULL,        -- process id on that host, for people
    mountpoint TEXT NOT NULL,    -- where it is mounted, for people; empty for a command that opened the volume itself
    started_ns INTEGER NOT NULL, -- start of the session, ns since 1970
    PRIMARY KEY (volume, session_id)
) STRICT, WITHOUT ROWID;

-- Each inode without names that a session still has open. The row goes when the session closes it or ends.
CREATE TABLE IF NOT EXISTS sustained (
    volume INTEGER NOT NULL,     -- volume.id
    session_id INTEGER NOT NULL, -- session that has it open
    ino INTEGER NOT NULL,        -- the inode, nlink = 0
    PRIMARY KEY (volume, session_id, ino)
) STRICT, WITHOUT ROWID;

-- Each removed name whose inode is kept until the trash expires or the name is restored.
CREATE TABLE IF NOT EXISTS trashed (
    volume INTEGER NOT NULL,     -- volume.id
    trash_id INTEGER NOT NULL,   -- unique in the volume, grows with the time of deletion
    deleted_ns INTEGER NOT NULL, -- when the name was removed, ns since 1970
    ino INTEGER NOT NULL,        -- inode that the name stood for
    parent INTEGER NOT NULL,     -- directory it was removed from, which may itself be in the trash
    name BLOB NOT NULL,          -- the name, as in dentry
    uid INTEGER NOT NULL,        -- user who removed it, and may restore it
    PRIMARY KEY (volume, trash_id)
) STRICT, WITHOUT ROWID;

-- Each slice that no chunk names any more and whose objects are to be deleted. Invariant: no row in `slice` with this id.
CREATE TABLE IF NOT EXISTS garbage (
    volume INTEGER NOT NULL,        -- volume.id
    slice_id INTEGER NOT NULL,      -- id of the slice
    length INTEGER NOT NULL,        -- its length in bytes: says which objects it has
    not_before_ns INTEGER NOT NULL, -- objects may be deleted from this time on, ns since 1970
    PRIMARY KEY (volume, slice_id)
) STRICT, WITHOUT ROWID;

-- Each directory with a quota.
CREATE TABLE IF NOT EXISTS quota (
    volume INTEGER NOT NULL,      -- volume.id
    ino INTEGER NOT NULL,         -- inode of the directory
    max_bytes INTEGER NOT NULL,   -- limit of the space below it in bytes; 0 = unlimited
    max_inodes INTEGER NOT NULL,  -- limit of the inodes below it; 0 = unlimited
    used_bytes INTEGER NOT NULL,  -- space in bytes below it now, in units of 4,096
    used_inodes INTEGER NOT NULL, -- inodes below it now, itself not counted
    PRIMARY KEY (volume, ino)
) STRICT, WITHOUT ROWID;

-- Each number of the volume that is exact because there is one writer.
CREATE TABLE IF NOT EXISTS counter (
    volume INTEGER NOT NULL, -- volume.id
    name TEXT NOT NULL,      -- used_bytes, used_inodes, next_ino …
    value INTEGER NOT NULL,  -- the number; its unit is in the name
    PRIMARY KEY (volume, name)
) STRICT, WITHOUT ROWID;
