"""What a volume needs done without anybody asking: garbage deleted, trash expired, chunks compacted, counters compared.

The holder of an embedded volume runs it while it is mounted, a service for every volume that it has open. The one part of
metasvc that touches objects.
"""
