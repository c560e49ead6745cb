"""The unix socket between the holder of an embedded volume and every other command on it.

``messages`` is the language, ``endpoint`` the socket's place in the file system, ``server`` the holder's side and
``caller`` the commands'. Must not know what the requests do: that is client.admin.
"""
