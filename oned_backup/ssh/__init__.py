"""SSH as everything here speaks it: one client configuration, strict about host keys.

    <state dir>/ssh/                0700
        config        what `ssh -F` reads; written anew at each start of the daemon
        shared        the same for commands to stores, which share a connection (ADR 24)
        known_hosts   the keys that somebody accepted, and no others
        ssh           `ssh -F config "$@"`, for programs that take no more than a command's name

Drivers learn the path of `config` from ODB_SSH_CONFIG. What is special about a host (its
port, key, jump host) stands in a file of the administrator's that `config` includes.
"""
