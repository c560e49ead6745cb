-- How the tables of 0001 lie on the disk. Room in pages (fillfactor) is there for new versions of rows: a version that finds
-- room in the page of the one before needs no entry in the index, and the old one is removed without a vacuum (HOT).
-- Vacuum and analyze go by thousands of changed rows instead of by a share of the table, which for a billion inodes
-- would be hundreds of millions of dead rows.

-- One row for each volume, and a new version of it for every commit: a page for itself, so that the old ones go at once.
ALTER TABLE volume SET (fillfactor = 10, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 100000);

-- Few rows that almost every commit replaces.
ALTER TABLE counter SET (fillfactor = 25, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 100000);
ALTER TABLE replies SET (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 100000);
ALTER TABLE quota SET (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 100000);
ALTER TABLE session SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
ALTER TABLE sustained SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
ALTER TABLE slice_range SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- Large tables. A file's inode is replaced when it is closed, written and touched, a directory's with every name in it.
ALTER TABLE inode SET (fillfactor = 90, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 10000);
ALTER TABLE dentry SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 10000);
ALTER TABLE chunk SET (fillfactor = 95, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 10000);
ALTER TABLE slice SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 10000);
ALTER TABLE packable SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 10000);
ALTER TABLE garbage SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 10000);
ALTER TABLE trashed SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 10000);

-- Bytes that do not shrink, or were tried before: to compress them would cost each commit of a small file for nothing.
ALTER TABLE slice ALTER COLUMN data SET STORAGE EXTERNAL;
ALTER TABLE replies ALTER COLUMN packed SET STORAGE EXTERNAL;
