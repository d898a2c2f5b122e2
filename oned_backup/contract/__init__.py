"""The driver contract: what daemon and drivers both import."""
