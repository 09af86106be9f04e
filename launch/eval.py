"""Runs the eval stage on one process: `python launch/eval.py CONFIG [key=value ...]`."""

from mmfoundry.launch.script import main

if __name__ == "__main__":
    main("eval")
