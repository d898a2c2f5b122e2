"""Backups in repositories of restic's.

program     restic itself: its command line, what its ends mean, its locks, its mount
settings    the datastore's parameters
place       the directory or bucket that the repositories lie in
store       what lies in a repository, and how a backup gets there
view        a mounted repository as a folder of finished backups
"""
