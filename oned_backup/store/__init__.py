"""Documents and the operation journal in a database."""
