"""Lists of images of any length: the command pear-infer (extra `infer`)."""
