"""The `mmfoundry` command and the scripts that `deepspeed`, `torchrun` and `srun` start."""
