"""Runs the release stage on one process: `python launch/release.py CONFIG [key=value ...]`."""

from mmfoundry.launch.script import main

if __name__ == "__main__":
    main("release")
