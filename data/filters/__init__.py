"""Filters of image-text pairs: one file a family, each registered in `base.FILTERS`; `tree.py` reads them from YAML."""
