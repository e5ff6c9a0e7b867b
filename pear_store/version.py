"""The version of the whole distribution: of pear_store, router and pear_train."""

__version__ = "0.2.0"
