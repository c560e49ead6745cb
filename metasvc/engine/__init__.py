"""The metadata engine: owner of a volume, rows in memory, group commit, and the rules of POSIX.

Reading order: memory, tx (how an operation sees rows); accounts, chunkmap, acl, dentries, content, trash,
namespace, attributes (the rules); owner, committer, engine (how rules are run); session, listing (MetaClient);
check, trees, dump, admin (MetaAdmin); packing, audit (what background jobs ask for); load (a volume out of a dump).
"""

from metasvc.engine.admin import EngineAdmin
from metasvc.engine.engine import Engine
from metasvc.engine.format import first_rows
from metasvc.engine.session import EngineSession

__all__ = ["Engine", "EngineAdmin", "EngineSession", "first_rows"]
