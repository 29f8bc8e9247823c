"""The control socket: QMP's wire protocol, the commands and their client.

qmp       bytes <-> messages, and the rules of a session; no I/O
results   the shapes of what the commands return
events    from any thread to every connection
arguments what a command takes
commands  what a request does
jobs      the commands about jobs
bitmaps   the commands about dirty bitmaps
transactions  backups, and what happens with them at one instant
server    who may connect, and how a connection lives and ends
client    a blocking client for the CLI
address   a Unix socket at a path of any length
"""
