"""Weights and configs to and from open_clip, transformers and peft."""
