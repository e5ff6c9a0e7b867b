#!/usr/bin/env python3
"""The command pear-infer under its earlier name."""

from router.infer.__main__ import main

if __name__ == "__main__":
    main()
