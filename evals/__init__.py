"""Evaluations: suites, metrics, and the tasks that measure a CLIP or a vision-language model."""
