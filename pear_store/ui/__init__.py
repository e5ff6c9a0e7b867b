"""A web page on this machine that shows a store. Needs the extra `serve`."""
