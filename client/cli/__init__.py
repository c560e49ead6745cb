"""The command ``atoll``: one module per command; ``main`` is the entry.

Only modules that the command at hand needs are imported: ``atoll --help`` costs what click costs. Composition roots are here:
``format`` and, through client.volume, everything that opens a volume.
"""
