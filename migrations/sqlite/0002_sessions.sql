-- Sessions over the wire, and what a service keeps beside its volumes. Conventions as in 0001.

ALTER TABLE session ADD COLUMN IF NOT EXISTS secret BLOB NOT NULL DEFAULT x''; -- whoever knows it may go on with the session; empty: a session in the owner's process

-- Each run of slice ids that was handed out to a session. Only that session may commit them, and only while it has a row.
CREATE TABLE IF NOT EXISTS slice_range (
    volume INTEGER NOT NULL,     -- volume.id
    session_id INTEGER NOT NULL, -- the session
    first INTEGER NOT NULL,      -- its first id
    id_count INTEGER NOT NULL,   -- how many ids, > 0; runs of one volume never overlap
    PRIMARY KEY (volume, session_id, first)
) STRICT, WITHOUT ROWID;

-- The replies that a session over the wire may ask for again, so that a request that is repeated is applied once.
-- The row is written in the transaction that applies the request. It goes when the session ends.
CREATE TABLE IF NOT EXISTS replies (
    volume INTEGER NOT NULL,     -- volume.id
    session_id INTEGER NOT NULL, -- the session
    confirmed INTEGER NOT NULL,  -- no request with a number below this one will be repeated
    packed BLOB NOT NULL,        -- replies to requests from that number on that changed something: a FromService message of metasvc/api/atoll.proto
    UNIQUE (volume, session_id)
) STRICT;

-- Each tenant of a service. A tenant may have no volume. An embedded volume's tenant, "local", needs no row.
CREATE TABLE IF NOT EXISTS tenant (
    name TEXT NOT NULL PRIMARY KEY, -- unique; no "/", not empty
    created_ns INTEGER NOT NULL     -- when it was made, ns since 1970
) STRICT, WITHOUT ROWID;

-- What the processes of a service share, by name: "token-key" is the key that signs tokens.
CREATE TABLE IF NOT EXISTS setting (
    name TEXT NOT NULL PRIMARY KEY, -- what it is
    value BLOB NOT NULL             -- its bytes; what they mean is said where the name is defined
) STRICT, WITHOUT ROWID;
