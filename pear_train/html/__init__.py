"""Reports, each one HTML file. Style and pictures are in the file; it has no script and loads nothing."""

from pear_train.html.training import check_html, write_html

__all__ = ["check_html", "write_html"]
