"""The HTTP face of the daemon, on a unix socket."""
