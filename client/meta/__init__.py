"""The metadata service, seen from a client: MetaClient and MetaAdmin over gRPC.

Reading order: channel (where the service is), connection (one session over streams that come and go), remote (MetaClient),
admin (MetaAdmin).
"""
