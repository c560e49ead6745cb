-- The metadata of many volumes of many tenants in one PostgreSQL schema.
--
-- Conventions for every table and column:
--   * Every table of rows is keyed by `volume` first (volume.id), so one volume's rows lie together in the index, and every
--     statement is bound to one volume. There are no foreign keys: who references whom is a rule, rules live in
--     metasvc/engine, and `atoll fsck` checks them.
--   * No column is NULL unless its comment says what NULL means.
--   * `*_bytes` are bytes, `*_ns` nanoseconds since 1970-01-01 UTC (negative before), names are bytes (BYTEA, compared
--     as memcmp), inode numbers are positive, integers are signed 64-bit: what is smaller would win nothing, for the next
--     column is aligned to 8 bytes again.
--   * TEXT is UTF-8 compared as memcmp (COLLATE "C"), whatever the locale of the database.
--   * One index for each table, that of its key: the only ways to a row are its key, and the keys of a group in order.
-- The rows and their invariants are those of metasvc/model.py, column for column.

-- Each volume, its format, and who owns it. Its row is locked and written by every commit, renewal and change of owner, and
-- that is what puts them into one order. Columns that every commit writes come first.
CREATE TABLE IF NOT EXISTS volume (
    -- Key of all other tables. Never given out again, so that rows left of a deleted volume can never be taken for rows
    -- of a new one.
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- Number of the last batch committed, by any owner: grows by one with every commit. 0: none.
    last_batch BIGINT NOT NULL DEFAULT 0,
    -- Fencing number: grows by one with every change of owner, never shrinks. 0: never owned.
    epoch BIGINT NOT NULL DEFAULT 0,
    -- Fencing number within an epoch: grows when the owner asks what became of a commit. A commit that was sent before that,
    -- and is still on its way, is void.
    attempt BIGINT NOT NULL DEFAULT 0,
    -- When the ownership expires unless it is renewed, by the clock of the database's server. NULL if and only if
    -- owner_nonce is.
    owner_expires TIMESTAMPTZ,
    -- Random text chosen by the process that owns the volume. NULL: nobody owns it.
    owner_nonce TEXT COLLATE "C",
    -- How to reach the owner, for messages and redirects. NULL if and only if owner_nonce is.
    owner_address TEXT COLLATE "C",
    -- Owner of the volume in the sense of accounts. NULL: the volume was deleted and its rows are being removed; then name is
    -- NULL as well.
    tenant TEXT COLLATE "C",
    -- Name of the volume, unique in its tenant. NULL as tenant.
    name TEXT COLLATE "C",
    -- metasvc.model.VolumeFormat as a JSON object with its own version; tenant and name in it equal the columns.
    format TEXT COLLATE "C" NOT NULL,
    UNIQUE (tenant, name)
);

-- Each inode that has a name, is sustained (unlinked but open) or is in the trash.
CREATE TABLE IF NOT EXISTS inode (
    volume BIGINT NOT NULL,      -- volume.id
    ino BIGINT NOT NULL,         -- inode number, 1 = root, never reused in the volume
    mode BIGINT NOT NULL,        -- st_mode: file type and permission bits
    nlink BIGINT NOT NULL,       -- names of a file; 2 + subdirectories of a directory; 0 = unlinked (open, or in the trash)
    uid BIGINT NOT NULL,         -- user id, 0 to 2^32 - 1
    gid BIGINT NOT NULL,         -- group id, 0 to 2^32 - 1
    rdev BIGINT NOT NULL,        -- device number of a character or block device, else 0
    size_bytes BIGINT NOT NULL,  -- length of a file or symlink target in bytes; of a directory the NUMBER OF ENTRIES
    atime_ns BIGINT NOT NULL,    -- last access, ns since 1970
    mtime_ns BIGINT NOT NULL,    -- last change of content, ns since 1970
    ctime_ns BIGINT NOT NULL,    -- last change of the inode, ns since 1970
    parent BIGINT NOT NULL,      -- inode of the directory with its only name; 0 = several names (see link) or none; root: 1
    child_bytes BIGINT NOT NULL, -- directories: space in bytes of the regular files named in it, each name counted; else 0
    map_version BIGINT NOT NULL, -- grows by one with every change of the chunk map
    size_epoch BIGINT NOT NULL,  -- grows by one with every truncate that lowered the length
    PRIMARY KEY (volume, ino)
);

-- Each name. Invariant: for every row there is an inode row with (volume, ino), and `type` is its file type.
CREATE TABLE IF NOT EXISTS dentry (
    volume BIGINT NOT NULL, -- volume.id
    parent BIGINT NOT NULL, -- inode of the directory
    name BYTEA NOT NULL,    -- 1 to 255 bytes, no 0x00, no 0x2F, neither "." nor ".."; stored as given, no encoding implied
    ino BIGINT NOT NULL,    -- inode that the name stands for
    type BIGINT NOT NULL,   -- file type bits (S_IFMT) of that inode
    PRIMARY KEY (volume, parent, name)
);

-- The chunk map: for each 64 MiB window of a file that holds any slice, which slices. No row = the window is a hole.
CREATE TABLE IF NOT EXISTS chunk (
    volume BIGINT NOT NULL,      -- volume.id
    ino BIGINT NOT NULL,         -- inode of the file
    chunk_index BIGINT NOT NULL, -- window: file offset // 67,108,864; 0 to 2^31 - 1
    refs BYTEA NOT NULL,         -- 20 bytes each, little-endian: u32 offset in the chunk, u64 slice id, u32 offset in the slice, u32 length (all in bytes but the id); sorted by offset, never overlapping, never empty
    PRIMARY KEY (volume, ino, chunk_index)
);

-- Each slice that some chunk names. Immutable but for refs and the place of the bytes.
CREATE TABLE IF NOT EXISTS slice (
    volume BIGINT NOT NULL,   -- volume.id
    slice_id BIGINT NOT NULL, -- unique in the volume, never reused; part of the object keys
    length BIGINT NOT NULL,   -- bytes of the slice, > 0
    refs BIGINT NOT NULL,     -- how many refs of chunk.refs of the volume name it, > 0
    kind BIGINT NOT NULL,     -- metasvc.model.SliceKind: 0 = bytes are in data, 1 = bytes are in one object per block
    data BYTEA NOT NULL,      -- kind 0: the bytes themselves; kind 1: BLAKE3-128 digests of the blocks' raw bytes, 16 bytes each, in order
    PRIMARY KEY (volume, slice_id)
);

-- Each extended attribute, POSIX ACLs among them.
CREATE TABLE IF NOT EXISTS xattr (
    volume BIGINT NOT NULL, -- volume.id
    ino BIGINT NOT NULL,    -- inode that has it
    name BYTEA NOT NULL,    -- full name with its name space ("user.x", "system.posix_acl_access"), 1 to 255 bytes
    value BYTEA NOT NULL,   -- 0 to 65,536 bytes; ACLs in the kernel's xattr encoding
    PRIMARY KEY (volume, ino, name)
);

-- In which directories a file with several names has them. No rows for inodes with nlink <= 1, none for directories.
-- Invariant: the sum of `names` over an inode is its nlink.
CREATE TABLE IF NOT EXISTS link (
    volume BIGINT NOT NULL, -- volume.id
    ino BIGINT NOT NULL,    -- inode of the file
    parent BIGINT NOT NULL, -- inode of a directory that names it
    names BIGINT NOT NULL,  -- how many names it has there, > 0
    PRIMARY KEY (volume, ino, parent)
);

-- Each client that is mounted, or was and is not yet cleaned up.
CREATE TABLE IF NOT EXISTS session (
    volume BIGINT NOT NULL,               -- volume.id
    session_id BIGINT NOT NULL,           -- unique in the volume, never reused
    host TEXT COLLATE "C" NOT NULL,       -- host name, for people
    pid BIGINT NOT NULL,                  -- process id on that host, for people
    mountpoint TEXT COLLATE "C" NOT NULL, -- where it is mounted, for people; empty for a command that opened the volume itself
    started_ns BIGINT NOT NULL,           -- start of the session, ns since 1970
    secret BYTEA NOT NULL,                -- whoever knows it may go on with the session; empty: a session in the owner's process
    PRIMARY KEY (volume, session_id)
);

-- Each inode without names that a session still has open. The row goes when the session closes it or ends.
CREATE TABLE IF NOT EXISTS sustained (
    volume BIGINT NOT NULL,     -- volume.id
    session_id BIGINT NOT NULL, -- session that has it open
    ino BIGINT NOT NULL,        -- the inode, nlink = 0
    PRIMARY KEY (volume, session_id, ino)
);

-- Each removed name whose inode is kept until the trash expires or the name is restored.
CREATE TABLE IF NOT EXISTS trashed (
    volume BIGINT NOT NULL,     -- volume.id
    trash_id BIGINT NOT NULL,   -- unique in the volume, grows with the time of deletion
    deleted_ns BIGINT NOT NULL, -- when the name was removed, ns since 1970
    ino BIGINT NOT NULL,        -- inode that the name stood for
    parent BIGINT NOT NULL,     -- directory it was removed from, which may itself be in the trash
    name BYTEA NOT NULL,        -- the name, as in dentry
    uid BIGINT NOT NULL,        -- user who removed it, and may restore it
    PRIMARY KEY (volume, trash_id)
);

-- Each slice that no chunk names any more and whose objects are to be deleted. Invariant: no row in `slice` with this id.
CREATE TABLE IF NOT EXISTS garbage (
    volume BIGINT NOT NULL,        -- volume.id
    slice_id BIGINT NOT NULL,      -- id of the slice
    length BIGINT NOT NULL,        -- its length in bytes: says which objects it has
    not_before_ns BIGINT NOT NULL, -- objects may be deleted from this time on, ns since 1970
    PRIMARY KEY (volume, slice_id)
);

-- Each run of slice ids that was handed out to a session. Only that session may commit them, and only while it has a row.
CREATE TABLE IF NOT EXISTS slice_range (
    volume BIGINT NOT NULL,     -- volume.id
    session_id BIGINT NOT NULL, -- the session
    first BIGINT NOT NULL,      -- its first id
    id_count BIGINT NOT NULL,   -- how many ids, > 0; runs of one volume never overlap
    PRIMARY KEY (volume, session_id, first)
);

-- The replies that a session over the wire may ask for again, so that a request that is repeated is applied once.
-- The row is written in the transaction that applies the request. It goes when the session ends.
CREATE TABLE IF NOT EXISTS replies (
    volume BIGINT NOT NULL,     -- volume.id
    session_id BIGINT NOT NULL, -- the session
    confirmed BIGINT NOT NULL,  -- no request with a number below this one will be repeated
    packed BYTEA NOT NULL,      -- replies to requests from that number on that changed something: a FromService message of metasvc/api/atoll.proto
    PRIMARY KEY (volume, session_id)
);

-- Each inline slice that may be gathered, until the job that packs has looked at it. A hint: losing one costs a row of `slice`, no more.
CREATE TABLE IF NOT EXISTS packable (
    volume BIGINT NOT NULL,      -- volume.id
    slice_id BIGINT NOT NULL,    -- the slice; it may be gone
    ino BIGINT NOT NULL,         -- the file that was written; it may be gone, or name the slice no more
    chunk_index BIGINT NOT NULL, -- which chunk of it
    written_ns BIGINT NOT NULL,  -- when it was committed, ns since 1970
    PRIMARY KEY (volume, slice_id)
);

-- Each slice that was gathered from small ones. The row may outlive its slice until the job that packs comes by.
CREATE TABLE IF NOT EXISTS pack (
    volume BIGINT NOT NULL,   -- volume.id
    slice_id BIGINT NOT NULL, -- the slice
    refs BIGINT NOT NULL,     -- refs that it was made for, > 0; slice.refs says how many there are now
    members BYTEA NOT NULL,   -- the chunks that they were in: for each the inode (8 bytes) and the index (4 bytes), little-endian
    PRIMARY KEY (volume, slice_id)
);

-- Each directory with a quota.
CREATE TABLE IF NOT EXISTS quota (
    volume BIGINT NOT NULL,      -- volume.id
    ino BIGINT NOT NULL,         -- inode of the directory
    max_bytes BIGINT NOT NULL,   -- limit of the space below it in bytes; 0 = unlimited
    max_inodes BIGINT NOT NULL,  -- limit of the inodes below it; 0 = unlimited
    used_bytes BIGINT NOT NULL,  -- space in bytes below it now, in units of 4,096
    used_inodes BIGINT NOT NULL, -- inodes below it now, itself not counted
    PRIMARY KEY (volume, ino)
);

-- Each number of the volume that is exact because there is one writer.
CREATE TABLE IF NOT EXISTS counter (
    volume BIGINT NOT NULL,         -- volume.id
    name TEXT COLLATE "C" NOT NULL, -- used_bytes, used_inodes, next_ino …
    value BIGINT NOT NULL,          -- the number; its unit is in the name
    PRIMARY KEY (volume, name)
);

-- Each tenant of a service. A tenant may have no volume. An embedded volume's tenant, "local", needs no row.
CREATE TABLE IF NOT EXISTS tenant (
    name TEXT COLLATE "C" NOT NULL PRIMARY KEY, -- unique; no "/", not empty
    created_ns BIGINT NOT NULL                  -- when it was made, ns since 1970
);

-- What the processes of a service share, by name: "token-key" is the key that signs tokens.
CREATE TABLE IF NOT EXISTS setting (
    name TEXT COLLATE "C" NOT NULL PRIMARY KEY, -- what it is
    value BYTEA NOT NULL                        -- its bytes; what they mean is said where the name is defined
);
