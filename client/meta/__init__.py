"""The metadata service, seen from a client: MetaClient and MetaAdmin over the wire.

Reading order: endpoint (where the service is), connection (one session over streams that come and go), recent (what was said a
moment ago), remote (MetaClient), admin (MetaAdmin). The bytes on the wire are metasvc.api.frames.
"""
