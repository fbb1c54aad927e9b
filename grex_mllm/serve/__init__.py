"""`grex serve`: a page and an HTTP API in front of one model. Nothing is written to disk, nothing outside is asked."""
