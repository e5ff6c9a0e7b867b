"""What tests share: makers of tasks and files, processes to kill, and how their output is read."""
