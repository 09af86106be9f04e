"""Runs the filter stage on one process: `python launch/filter.py CONFIG [key=value ...]`."""

from mmfoundry.launch.script import main

if __name__ == "__main__":
    main("filter")
