"""Detectors of things in pictures: one file each, registered in `base.DETECTORS`."""
