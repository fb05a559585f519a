"""Searches for the codes and scales of block layouts, one file per kind; no file here knows a byte layout."""
