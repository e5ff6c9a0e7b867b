"""Serves tasks over HTTP: requests for any tasks share batches (extra `serve`)."""
