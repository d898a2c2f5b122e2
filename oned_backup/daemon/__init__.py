"""The service: a bounded pool of workers over the queue of operations."""
