"""Backups in repositories of restic's.

program     restic itself: its command line, what its ends mean, its locks, its mount
settings    the datastore's parameters
store       what lies in a datastore, and how a backup gets there
view        a mounted repository as a folder of finished backups
"""
