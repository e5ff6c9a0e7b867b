"""The command pear-infer, which runs tasks on lists of images of any length (extra `infer`)."""
