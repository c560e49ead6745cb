"""Scheduled dumps of a volume's metadata in the volume's own bucket, and the objects that are kept for them.

A store that is lost takes the names with it, and the objects without names are worth nothing. So whoever owns a volume dumps
it now and then (metasvc.engine.dump: consistent while everybody works) into the bucket where its objects are: who has the
bucket has the volume as it was. `ladder` says which backups stay, `shelf` where they lie and how they are read, `making` writes
one, `keeping` is the job of an owner, `slice_ids` helps a volume that is restored. None of them knows clients or FUSE.

What a backup is: numbered parts, `PART_BYTES` each, that together are one dump, and a manifest. **It exists when its manifest
does**, which is put last and removed first. Names have a random end, so two writers never write one backup. A writer that is
killed, handed over to another process, or that gives up (bucket away, full, too slow) leaves parts without a manifest: they
are nobody's, the next try begins anew under a new name, and parts older than `PARTS_AGE_S` without a manifest are removed. No
backup takes that long: after `LONGEST_S` its writer gives up, and puts no manifest.

**Objects outlive the backups that name them.** A backup is worth nothing where the objects that it names are gone. Let made(B)
be the time at which the dump of backup B began, and g(S) the time at which slice S became garbage (Garbage.not_before_ns).

Lemma: if g(S) <= made(B), both by the clock of one owner, B does not name S. The burial of S was applied before the dump began,
so it is in a batch that is durable when the dump ends (it waits for those), and what a dump shows is the volume after that.

Rule: objects of S are deleted only if g(S) <= made(B) - `CLOCKS_APART_S` for *every protected* backup B. Protected are those
younger than the window that they promise (``window_s`` in the manifest), and always the newest one. While there is none nothing
is deleted. The subtraction is for owners whose clocks differ, or a clock that is set back; a bucket refuses requests whose time
is off by as much.

So: the newest backup, and each of the last window, has all its objects in the bucket. Interleavings:

- A backup that is being made while garbage is deleted is younger than the oldest protected one, B0; whatever is deleted was
  garbage before made(B0), hence before made(B). It is not necessary to know of it.
- Nor of a manifest that its writer took for lost (an answer that did not come) and that turns up later: the same holds.
- A writer that was succeeded meanwhile: it asks its ownership before it puts the manifest; if its manifest comes later all the
  same, the same holds again, for its successor protects the backups that it found in the bucket.
- The list of backups that a job goes by is read once after it got the volume, and again after each backup: only owners make
  backups, and what others have made late is younger (above). If the list cannot be read nothing is deleted.

A process that makes no backups (`--backup` was not given) keeps what the manifests in the bucket promise, and no more: it
looks every `LOOK_S`, and does not protect the newest one for ever. `atoll gc` does protect that, unless it is told not to.

What it costs: bytes that were removed or replaced stay for the window and one interval more (after their time in the trash, if
they were removed by name).
"""

from metasvc.jobs.backups.keeping import BackupPolicy, Backups, held_from_ns
from metasvc.jobs.backups.ladder import LADDER, Rung, to_remove
from metasvc.jobs.backups.shelf import Manifest, Shelf, all_manifests, read_backup
from metasvc.jobs.backups.slice_ids import first_free_slice

__all__ = [
    "LADDER",
    "BackupPolicy",
    "Backups",
    "Manifest",
    "Rung",
    "Shelf",
    "all_manifests",
    "first_free_slice",
    "held_from_ns",
    "read_backup",
    "to_remove",
]
