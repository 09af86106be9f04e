"""Runs the pretrain stage: `deepspeed --num_gpus 2 launch/pretrain.py CONFIG [key=value ...]`, torchrun or python."""

from mmfoundry.launch.script import main

if __name__ == "__main__":
    main("pretrain")
