"""Tasks as a service: requests of any tasks in mixed batches, over HTTP (extra `serve`)."""
