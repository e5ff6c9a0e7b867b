"""Reports: one HTML file each, its style and pictures within, no script, nothing from elsewhere."""

from pear_train.html.training import check_html, write_html

__all__ = ["check_html", "write_html"]
