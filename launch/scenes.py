"""Runs the scenes stage on one process: `python launch/scenes.py CONFIG [key=value ...]`."""

from mmfoundry.launch.script import main

if __name__ == "__main__":
    main("scenes")
