"""Columns that follow from other columns: one file a family, each registered in `base.DERIVATIONS`."""
