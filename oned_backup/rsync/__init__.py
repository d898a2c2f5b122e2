"""Backups on a server that is reached by SSH and written by rsync.

arguments   the datastore's parameters; which of RSYNC_ARGS are let through
failures    what the exit codes of rsync and its messages mean
server      what changes a store besides rsync: a fixed script that runs over there
transfer    sending a backup's files, again and again until they are there
"""
