"""Evaluations: suites, metrics, and the tasks that measure a CLIP or a vision-language model."""

from mmfoundry.evals.task import EVAL_TASKS

__all__ = ["EVAL_TASKS"]
