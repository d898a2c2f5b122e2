"""Backup, restore, delete, verify and recovery: journaled sequences of steps."""
