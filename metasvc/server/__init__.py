"""The metadata service: engines behind a socket.

Reading order: replies, operations, session (one session, its connection gone or not), volumes (which engines and sessions there
are), connection (one stream), tokens, service (who may call, and what).
"""
