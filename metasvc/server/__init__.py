"""The metadata service: engines behind gRPC.

Reading order: replies, operations, session (one session, its connection gone or not), volumes (which engines and sessions there
are), connection (one stream), tokens, service (the gRPC server).
"""
